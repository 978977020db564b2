"""The HTTP side of the ingress: routes, limits, keys, request ids; errors say what the client did, never where code is."""

from __future__ import annotations

import hmac
import logging
import re
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import requests
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.routing import APIRouter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raysys.errors import UserError
from raysys.serve.messages import (
    FeedbackAnswer,
    FeedbackRequest,
    Models,
    RankBatch,
    RankBatchAnswer,
    Ranking,
    RankRequest,
    Recommendation,
    RecommendRequest,
    RetrieveRequest,
)
from raysys.serve.page import PAGE_PATHS, page_router
from raysys.serve.problems import BadRequest, Unavailable
from raysys.serve.prometheus import scrape
from raysys.serve.routing import PROBLEMS, cascade
from raysys.serve.settings import HttpSettings

log = logging.getLogger("ray.serve")
OPEN_PATHS = ("/healthz",)
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_TEXT = re.compile(rb'"(?:[^"\\]|\\.)*"')
_BRACKETS = re.compile(rb"[\[\]{}]")

router = APIRouter()


def make_api(settings: HttpSettings, keys: Sequence[str]) -> FastAPI:
    """The application that `serve.ingress` takes. keys: those that let a client in; none lets everybody in."""
    api = FastAPI(title="raysys", version="1", docs_url="/docs", redoc_url=None)
    api.include_router(router)
    if settings.page:
        api.include_router(page_router)
    open_paths = (*OPEN_PATHS, *(PAGE_PATHS if settings.page else ()))
    api.add_middleware(Guard, settings=settings, keys=[key.encode() for key in keys], open_paths=open_paths)

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return problem(request, 422, f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}")

    @api.exception_handler(BadRequest)
    async def refused(request: Request, error: BadRequest) -> JSONResponse:
        return problem(request, 422, str(error))

    @api.exception_handler(Unavailable)
    async def unavailable(request: Request, error: Unavailable) -> JSONResponse:
        return problem(request, 503, str(error), {"Retry-After": str(error.retry_after_s)})

    @api.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        log.error("request %s failed", request.state.request_id, exc_info=error)
        return problem(request, 500, "internal error")

    return api


def problem(request: Request, status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An answer in the form of `Problem`."""
    return JSONResponse({"error": message, "request_id": request.state.request_id}, status, headers)


@router.post("/v1/recommend", responses=PROBLEMS)
async def recommend(body: RecommendRequest, request: Request) -> Recommendation:
    """The best items for a user: retrieval, early stage, final stage."""
    return await cascade().recommend(body, request.state.request_id)


@router.post("/v1/retrieve", responses=PROBLEMS)
async def retrieve(body: RetrieveRequest, request: Request) -> Ranking:
    """Candidates for a user from the index."""
    return await cascade().retrieve(body, request.state.request_id)


@router.post("/v1/rank", responses=PROBLEMS)
async def rank(body: RankRequest | RankBatch, request: Request) -> Ranking | RankBatchAnswer:
    """Predictions for a user's items, best first; or for several users at once."""
    if isinstance(body, RankRequest):
        return (await cascade().rank([body], request.state.request_id))[0]
    return RankBatchAnswer(rankings=await cascade().rank(body.requests, request.state.request_id))


@router.post("/v1/feedback", responses=PROBLEMS)
async def feedback(body: FeedbackRequest, request: Request) -> FeedbackAnswer:
    """Rewards of items that were shown, on disk when this answers."""
    return await cascade().feedback(body, request.state.request_id)


@router.get("/v1/models", responses=PROBLEMS)
async def models() -> Models:
    """The releases that are served and their shares of the users."""
    return cascade().models()


@router.get("/healthz")
async def healthz() -> PlainTextResponse:
    """Whether this replica has a plan. That models compute is checked in their own replicas."""
    cascade().check_health()
    return PlainTextResponse("ok")


@router.get("/metrics")
def metrics() -> Response:
    """Prometheus metrics of every replica, as each node of the cluster exports them."""
    return PlainTextResponse(scrape(requests.Session()), media_type="text/plain; version=0.0.4")


class Guard:
    """Outermost: notes the request's id, asks for a key, and reads no more of a body than is allowed.

    Serve's proxy gives every request an id, its client's where that sent one, and returns it in X-Request-ID.
    """

    def __init__(self, app: ASGIApp, settings: HttpSettings, keys: Sequence[bytes], open_paths: Sequence[str]) -> None:
        self.app, self.settings, self.keys, self.open_paths = app, settings, keys, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI 3."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        request = Request(scope)
        if not self._is_known(headers, scope["path"]):
            await problem(request, 401, "a valid key is expected in the header X-API-Key")(scope, receive, send)
            return
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if scope["method"] == "POST" and kind != b"application/json":
            await problem(request, 415, "Content-Type: application/json is expected")(scope, receive, send)
            return
        body, refusal = await self._read(receive, headers)
        if refusal is not None:
            await problem(request, *refusal)(scope, receive, send)
            return
        done = False

        async def replay() -> Message:
            nonlocal done
            if done:
                return await receive()
            done = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    def _is_known(self, headers: dict[bytes, bytes], path: str) -> bool:
        """Every key is compared, each in constant time."""
        given = headers.get(b"x-api-key", b"")
        matches = [hmac.compare_digest(given, key) for key in self.keys]
        return not self.keys or path in self.open_paths or any(matches)

    async def _read(self, receive: Receive, headers: dict[bytes, bytes]) -> tuple[bytes, tuple[int, str] | None]:
        length = headers.get(b"content-length", b"0")
        too_long = 413, f"the body has more than {self.settings.max_body} bytes"
        if not length.isdigit() or int(length) > self.settings.max_body:
            return b"", too_long
        body, more = bytearray(), True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False) and message["type"] == "http.request"
            if len(body) > self.settings.max_body:
                return b"", too_long
        if depth(bytes(body)) > self.settings.max_depth:
            return b"", (422, f"the body is nested more than {self.settings.max_depth} levels deep")
        return bytes(body), None


def depth(body: bytes) -> int:
    """How deep brackets nest outside of texts: a parser that recurses must never see what is too deep for it."""
    brackets = np.frombuffer(b"".join(_BRACKETS.findall(_TEXT.sub(b"", body))), np.uint8)
    steps = np.where((brackets == ord("[")) | (brackets == ord("{")), 1, -1)
    return int(steps.cumsum().max(initial=0))


def read_keys(path: str) -> list[str]:
    """The keys of a file, one a line; a UserError where there is none."""
    try:
        keys = [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
    except OSError as error:
        raise UserError(
            f"serve.http.api_keys: {path}: {error.strerror}", "a file with a key a line is expected"
        ) from None
    if not keys or min(map(len, keys)) < 16:
        raise UserError(f"serve.http.api_keys: {path}: a key is missing or short", "16 characters or more are expected")
    return keys
