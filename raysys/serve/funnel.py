"""The stages of one request one after another, within its deadline: fewer items where time runs short, never none."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raysys.models.retrieval.indexes.index import Ids
from raysys.serve.answers import explored_items, name_impressions, ranked, scored
from raysys.serve.bandit.explorer import Explorer
from raysys.serve.bandit.feedback import Impressions
from raysys.serve.messages import RecommendRequest, ScoredItem, StageReport
from raysys.serve.settings import CascadeSettings
from raysys.serve.stages import Call, Candidates
from raysys.serve.visitors import Visitor

MARGIN_S = 0.005
"""Of a deadline, kept for the way back to the client."""


class _Costs:
    """Seconds that a stage takes for an item, as a moving average over its calls: what a deadline leaves room for."""

    WEIGHT = 0.1

    def __init__(self) -> None:
        self._per_item: float | None = None

    def add(self, items: int, seconds: float) -> None:
        found = seconds / max(items, 1)
        self._per_item = found if self._per_item is None else self._per_item + self.WEIGHT * (found - self._per_item)

    def room(self, seconds: float, most: int) -> int:
        """The items, at most `most`, that can be expected to be ready in these seconds."""
        if self._per_item is None:
            return most if seconds > 0 else 0
        found = max(0, min(most, int(seconds / self._per_item)))
        if not found:  # nothing will be measured: without this one slow moment would turn the stage off for good
            self._per_item *= 1 - self.WEIGHT
        return found


@dataclass
class Passage:
    """One request on its way. complete: whether every stage did all of its work. impressions: to be logged."""

    version: str
    visitor: Visitor
    request: RecommendRequest
    request_id: str
    deadline: float
    items: list[ScoredItem] = field(default_factory=list)
    explored: list[ScoredItem] = field(default_factory=list)
    stages: list[StageReport] = field(default_factory=list)
    complete: bool = True
    impressions: Impressions | None = None

    def note(self, stage: str, entered: int, left: int, seconds: float, items: Callable[[], list[ScoredItem]]) -> None:
        """Report a stage. items: what it scored, asked for where the request wants to see it."""
        shown = items() if self.request.explain else []
        self.stages.append(
            StageReport(stage=stage, entered=entered, left=left, milliseconds=1000 * seconds, items=shown)
        )


class Funnel:
    """call: asks a stage, "retrieve", "early" or "rank". explorer: where the deployment has Online Matching."""

    def __init__(
        self,
        settings: CascadeSettings,
        call: Callable[[str, Call], Awaitable[Any]],
        explorer: Explorer | None,
    ) -> None:
        self._settings, self._call, self._explorer = settings, call, explorer
        self._rank_cost = _Costs()

    async def run(
        self, version: str, visitor: Visitor, request: RecommendRequest, request_id: str = "", learn: bool = True
    ) -> Passage:
        """Candidates, the early choice, the final order.

        Candidates are waited for. Where the early stage is late the retriever's order is the answer, where the final one is,
        the early stage's. learn: whether Online Matching takes part.
        """
        limit = (request.deadline_ms or self._settings.deadline_ms) / 1000
        passage = Passage(version, visitor, request, request_id, time.monotonic() + limit - min(MARGIN_S, limit / 2))
        explorer = self._explorer if learn else None
        found = best = await self._retrieve(passage)
        ids = found.ids if explorer is None else self._with_offers(explorer, passage, found)
        early = await self._choose(passage, ids) if len(ids) else None
        if early is not None:
            best = early
            passage.items = (await self._rank(passage, early.ids))[: request.count]
        done = len(passage.items)
        passage.items += scored(best.cut(done, request.count))
        if explorer is not None:
            self._explore(explorer, passage, found)
        return passage

    async def _retrieve(self, passage: Passage) -> Candidates:
        wide = max(self._settings.retrieve, passage.request.count)
        call = Call(passage.version, passage.visitor.row, wide, exclude=passage.visitor.left_out)
        start = time.monotonic()
        outcome = await self._call("retrieve", call)
        assert isinstance(outcome, Candidates)
        passage.note("retrieve", wide, len(outcome.ids), time.monotonic() - start, lambda: scored(outcome))
        return outcome

    def _with_offers(self, explorer: Explorer, passage: Passage, found: Candidates) -> Ids:
        """The candidates [n] with those that Online Matching has learned to be good."""
        start = time.monotonic()
        left_out = np.concatenate([passage.visitor.left_out, found.ids])
        more, means = explorer.exploit(passage.version, found.user, left_out)
        if len(more):
            offers, seconds = Candidates(more, means), time.monotonic() - start
            passage.note("learned", len(more), len(more), seconds, lambda: scored(offers))
        return np.concatenate([found.ids, more])

    async def _choose(self, passage: Passage, ids: Ids) -> Candidates | None:
        """The items [n] that the final stage gets; None where the early stage is late."""
        call = Call(passage.version, passage.visitor.row, len(ids), ids)
        outcome, seconds = await self._until(passage.deadline, "early", call)
        if outcome is None:
            passage.complete = False
            return None
        assert isinstance(outcome, Candidates)
        kept = min(len(ids), max(self._settings.rank, passage.request.count))
        passage.note("early", len(ids), kept, seconds, lambda: scored(outcome))
        return outcome.cut(0, kept)

    async def _rank(self, passage: Passage, ids: Ids) -> list[ScoredItem]:
        """As many of these items as there is time for, best first."""
        room = self._rank_cost.room(passage.deadline - time.monotonic(), len(ids))
        passage.complete = room == len(ids)
        if not room:
            return []
        call = Call(passage.version, passage.visitor.row, items=ids[:room], request_id=passage.request_id)
        outcome, seconds = await self._until(passage.deadline, "rank", call)
        self._rank_cost.add(room, seconds)
        if outcome is None:
            passage.complete = False
            return []
        order = ranked(call.items, outcome)
        passage.note("rank", room, min(room, passage.request.count), seconds, lambda: order)
        return order

    def _explore(self, explorer: Explorer, passage: Passage, found: Candidates) -> None:
        shown = np.array([item.item for item in passage.items], np.int64)
        left_out = np.concatenate([passage.visitor.left_out, shown])
        explored = explorer.explore(passage.version, passage.request.user, found.user, left_out)
        passage.explored = explored_items(explored)
        passage.impressions = explorer.impressions(passage.version, found.user, shown, explored, time.time())
        if passage.impressions is not None:
            name_impressions(passage.version, [*passage.items, *passage.explored], passage.impressions)

    async def _until(self, deadline: float, stage: str, call: Call) -> tuple[Any, float]:
        """The outcome, None where it is not there in time, and the seconds until then."""
        start = time.monotonic()
        try:
            outcome = await asyncio.wait_for(self._call(stage, call), max(deadline - start, 0.001))
        except asyncio.TimeoutError:
            outcome = None
        return outcome, time.monotonic() - start
