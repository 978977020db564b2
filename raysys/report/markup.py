"""HTML and SVG written from Python calls. Whatever is not markup already is escaped on its way in."""

from __future__ import annotations

import html
from collections.abc import Iterable

_WITHOUT_END = {"meta"}


class Markup(str):
    """Text that is HTML or SVG already. Only `tag` and `join` make it, from parts that are markup or get escaped."""

    __slots__ = ()


def join(children: Iterable[object]) -> Markup:
    """The children in a row; None is left out."""
    parts = (child for child in children if child is not None)
    return Markup("".join(part if isinstance(part, Markup) else html.escape(str(part)) for part in parts))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element; `class_` is written class, `stroke_width` stroke-width, and an attribute that is None is left out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    end = "" if name in _WITHOUT_END else f"</{name}>"
    return Markup(f"<{name}{written}>{join(children)}{end}")


def table(header: list[str], rows: list[list[object]], text_columns: int = 1, class_: str | None = None) -> Markup:
    """A table whose first `text_columns` columns are text; the others hold figures and are aligned on the right."""

    def cells(kind: str, row: Iterable[object]) -> Markup:
        return tag("tr", *(tag(kind, cell, class_=None if i < text_columns else "n") for i, cell in enumerate(row)))

    body = tag("tbody", *(cells("td", row) for row in rows))
    return tag("div", tag("table", tag("thead", cells("th", header)), body, class_=class_), class_="scroll")
