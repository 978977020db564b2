"""The page at /: a person picks a user, sees what each stage made of the candidates, and gives feedback by clicking items."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fastapi import Path as InPath
from fastapi import Query
from fastapi.responses import FileResponse
from fastapi.routing import APIRouter

from raysys.serve.messages import ItemsRequest, Rows
from raysys.serve.routing import PROBLEMS, cascade

FOLDER = Path(__file__).with_name("static")
PAGE_PATHS = ("/", "/page.css", "/page.js")
_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:"

page_router = APIRouter()


@page_router.get("/", include_in_schema=False)
async def index() -> FileResponse:
    """The page."""
    return _file("page.html")


@page_router.get("/page.css", include_in_schema=False)
async def style() -> FileResponse:
    """Its style."""
    return _file("page.css")


@page_router.get("/page.js", include_in_schema=False)
async def script() -> FileResponse:
    """Its script."""
    return _file("page.js")


@page_router.get("/v1/users", responses=PROBLEMS)
async def users(count: Annotated[int, Query(ge=1, le=1000)] = 100) -> Rows:
    """Users to choose from."""
    return await cascade().some_users(count)


@page_router.get("/v1/users/{user}", responses=PROBLEMS)
async def user(user: Annotated[str, InPath(max_length=256)]) -> Rows:
    """What the user store has of a user."""
    return await cascade().user(user)


@page_router.post("/v1/items", responses=PROBLEMS)
async def items(body: ItemsRequest) -> Rows:
    """What the item table of a release has of these items."""
    return await cascade().items(body)


def _file(name: str) -> FileResponse:
    return FileResponse(FOLDER / name, headers={"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"})
