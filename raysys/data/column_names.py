"""What the name of a column says about it: a label, an id, whose property it is."""

from __future__ import annotations

import re

from raysys.schema import Side

LABELS = {
    *("label", "target", "y", "click", "clicked", "like", "liked", "conversion", "converted"),
    *("purchase", "purchased", "bought", "install", "installed"),
}
EXAMPLE_IDS = {"example_id", "row_id", "event_id", "impression_id"}
TIMES = {"time", "timestamp", "ts", "datetime", "event_time", "unix_time"}
WEIGHTS = {"weight", "sample_weight", "example_weight"}
ID_WORDS = {
    "id",
    "uid",
    "code",
    "key",
    "hash",
    "zip",
    "type",
    "category",
    "class",
    "index",
    "hour",
    "weekday",
    "month",
    "year",
}
GROUPS = ("user", "uid", "member", "customer", "visitor", "household", "account", "session")
"""What a metric per group groups by, the best first."""
USER_WORDS = {*GROUPS, "age", "gender", "sex", "occupation"}
ITEM_WORDS = {
    *("item", "product", "movie", "video", "article", "ad", "creative", "campaign", "brand", "genre", "title"),
    *("advertiser", "publisher", "seller", "author"),
}
THINGS = {*GROUPS, *ITEM_WORDS, "device", "country", "city", "region", "store", "shop", "page", "site", "app"}
COUNT_WORDS = {
    "num",
    "count",
    "total",
    "sum",
    "mean",
    "avg",
    "average",
    "max",
    "min",
    "rate",
    "ratio",
    "share",
    "score",
}
POSITION_WORDS = {"position", "pos", "slot", "rank"}
HISTORY_WORDS = {
    "history",
    "hist",
    "seq",
    "sequence",
    "recent",
    "last",
    "past",
    "previous",
    "viewed",
    "clicked",
    "liked",
}


def words(name: str) -> tuple[str, ...]:
    """The words of a name in lower case and singular: "historyItem_ids" is history, item, id; "C12" is c12."""
    spaced = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower()
    found = re.findall(r"[^\W_]+", spaced) or [name]
    return tuple(
        word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in found
    )


def stem(name: str) -> tuple[str, ...]:
    """The words without a last "id": what the ids are of, which names their table."""
    found = words(name)
    return found[:-1] if len(found) > 1 and found[-1] in ("id", "ids") else found


def names_a_thing(name: str) -> bool:
    """Whether its values can be nothing but ids: "item_id", "user"."""
    return stem(name) != words(name) or bool(THINGS & set(stem(name)[-1:]) - COUNT_WORDS)


def is_label(name: str) -> bool:
    """Whether the whole name, but for "is" before it, is a usual name of a label."""
    found = words(name)
    return "_".join(found[1:] if found[:1] == ("is",) else found) in LABELS


def is_id(name: str) -> bool:
    """Whether numbers in such a column are ids."""
    found = set(words(name))
    if re.fullmatch(
        r"(c|cat|categorical)_?\d+", name.lower()
    ):  # as the columns of Criteo's and Avazu's logs are called
        return True
    return not COUNT_WORDS & found and (bool(ID_WORDS & found) or bool(THINGS & set(stem(name)[-1:])))


def is_history(name: str) -> bool:
    """Whether a list in such a column has an order that matters."""
    return bool(HISTORY_WORDS & set(words(name)))


def side_of(name: str) -> Side:
    """Whose property it is; the first word that says so decides."""
    sides: dict[Side, set[str]] = {"user": USER_WORDS | HISTORY_WORDS, "item": ITEM_WORDS, "position": POSITION_WORDS}
    return next((side for word in words(name) for side, known in sides.items() if word in known), "context")
