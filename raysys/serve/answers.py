"""What stages say, as the messages that clients get. Our own numbers are not validated: for 200 items that takes a millisecond."""

from __future__ import annotations

import numpy as np

from raysys.models.retrieval.indexes.index import NO_ITEM, Ids
from raysys.serve.bandit.feedback import Impressions
from raysys.serve.bandit.policy import Recommendations
from raysys.serve.messages import ScoredItem
from raysys.serve.stages import Candidates, Predictions


def scored(found: Candidates) -> list[ScoredItem]:
    """Candidates in their order."""
    pairs = zip(found.ids.tolist(), found.scores.tolist(), strict=True)
    return [ScoredItem.model_construct(item=item, score=score) for item, score in pairs]


def ranked(ids: Ids, found: Predictions) -> list[ScoredItem]:
    """Best first; equal ones in the order in which they came."""
    scores = found.values[:, found.task]
    order = np.argsort(-scores, kind="stable")
    rows = zip(ids[order].tolist(), scores[order].tolist(), found.values[order].tolist(), strict=True)
    return [
        ScoredItem.model_construct(item=item, score=score, predictions=dict(zip(found.tasks, values, strict=True)))
        for item, score, values in rows
    ]


def explored_items(found: Recommendations | None) -> list[ScoredItem]:
    """What is explored of one user; finite bounds, also of an item that was never shown and comes first for it."""
    if found is None:
        return []
    pairs = zip(found.item[0].tolist(), np.nan_to_num(found.score[0]).tolist(), strict=True)
    return [ScoredItem(item=item, score=score) for item, score in pairs if item != NO_ITEM]


def name_impressions(version: str, items: list[ScoredItem], impressions: Impressions) -> None:
    """Give each item the name of its impression, in the same order."""
    for item, number in zip(items, impressions.id.tolist(), strict=True):
        item.impression = f"{version}:{number:016x}"


def read_impression(name: str) -> tuple[str, int] | None:
    """The release and the number of an impression; None where it is no name of one."""
    version, colon, number = name.rpartition(":")
    if not colon or len(number) != 16 or set(number) - set("0123456789abcdef"):
        return None
    value = int(number, 16)
    return (version, value) if value < 2**63 else None
