"""The path of one request through the stages: the user's row, candidates, the early choice, the final order."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from ray.util.metrics import Counter, Histogram

from raysys.serve.messages import (
    Models,
    Ranking,
    RankRequest,
    Recommendation,
    RecommendRequest,
    RetrieveRequest,
    Scalar,
    ScoredItem,
    StageReport,
    VersionFacts,
)
from raysys.serve.plan import Plan
from raysys.serve.replica import SECONDS, Refused
from raysys.serve.settings import CascadeSettings
from raysys.serve.stages import Call, Candidates, Predictions
from raysys.serve.store import ArrowStore, FeatureStore

log = logging.getLogger("ray.serve")
COUNTS = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0]
MARGIN_S = 0.005
"""Of a deadline, kept for the way back to the client."""


class BadRequest(ValueError):
    """The request is at fault; the message may be shown to the client."""


class Overloaded(RuntimeError):
    """A queue is full. retry_after_s: when the client may come again."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__("too many requests are waiting")
        self.retry_after_s = retry_after_s


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


class _Visitor(NamedTuple):
    """row: [1] the user's columns and the request's context. left_out: items that are not shown to them."""

    row: pa.Table
    left_out: NDArray[np.int64]


class Cascade:
    """The ingress. A request keeps the version that `Plan.assign` gives it through every stage.

    `reconfigure` takes the plan; the stages must have its releases in memory before.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        retriever: DeploymentHandle,
        early: DeploymentHandle,
        ranker: DeploymentHandle,
    ) -> None:
        self.settings = CascadeSettings(**settings)
        self._handles = {"retrieve": retriever, "early": early, "rank": ranker}
        self._users: FeatureStore = ArrowStore(self.settings.users)
        self._plan: Plan | None = None
        self._in_flight = 0
        self._rank_cost = _Costs()
        self._shadows: set[asyncio.Task[None]] = set()
        self._seconds = Histogram("raysys_request_seconds", "Latency.", SECONDS, ("stage", "version"))
        self._requests = Counter("raysys_requests", "Requests by how they ended.", ("outcome", "version"))
        self._candidates = Histogram("raysys_candidates", "Items that a stage passed on.", COUNTS, ("stage", "version"))

    def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Serve's call with `user_config`: the plan, in one assignment, and the newest rows of users."""
        plan = Plan.from_config(config)
        self._users.refresh()
        self._plan = plan

    def check_health(self) -> None:
        """Serve's call. That the stages compute is what their own checks say."""
        if self._plan is None:
            raise RuntimeError("no plan")

    @property
    def plan(self) -> Plan:
        """Which release answers whom."""
        assert self._plan is not None
        return self._plan

    def models(self) -> Models:
        """What is served."""
        plan = self.plan
        return Models(
            versions=[
                VersionFacts(version=version, share=plan.traffic.get(version, 0.0), shadow=version == plan.shadow)
                for version in sorted(plan.releases)
            ]
        )

    async def recommend(self, request: RecommendRequest, request_id: str) -> Recommendation:
        """The whole cascade. Where time runs short fewer items are ranked, or the early stage's order is the answer."""
        plan = self.plan
        version = plan.assign(request.user)
        answer = await self._counted(version, request_id, self._recommend(version, request, request_id))
        if plan.shadow is not None and plan.shadow != version:
            task = asyncio.create_task(self._shadow(plan.shadow, request, request_id))
            self._shadows.add(task)
            task.add_done_callback(self._shadows.discard)
        return answer

    async def retrieve(self, request: RetrieveRequest, request_id: str) -> Ranking:
        """Candidates alone."""
        version = self.plan.assign(request.user)
        visitor = self._visitor(request.user, request.context, request.exclude)
        call = Call(version, visitor.row, request.count, exclude=visitor.left_out)
        found = await self._counted(version, request_id, self._call("retrieve", call))
        return Ranking(request_id=request_id, version=version, items=_scored(found))

    async def rank(self, requests: Sequence[RankRequest], request_id: str) -> list[Ranking]:
        """Predictions for the items of each request, best first."""
        return list(await asyncio.gather(*(self._rank_one(request, request_id) for request in requests)))

    async def _rank_one(self, request: RankRequest, request_id: str) -> Ranking:
        version = self.plan.assign(request.user)
        row = self._visitor(request.user, request.context, []).row
        ids = np.array(request.items, np.int64)
        found = await self._counted(version, request_id, self._call("rank", Call(version, row, items=ids)))
        return Ranking(request_id=request_id, version=version, items=_ranked(ids, found))

    async def _recommend(self, version: str, request: RecommendRequest, request_id: str) -> Recommendation:
        limit = (request.deadline_ms or self.settings.deadline_ms) / 1000
        deadline = time.monotonic() + limit - min(MARGIN_S, limit / 2)
        visitor = self._visitor(request.user, request.context, request.exclude)
        wide = max(self.settings.retrieve, request.count)
        found, first = await self._timed(
            "retrieve", Call(version, visitor.row, wide, exclude=visitor.left_out), wide, request.explain
        )
        narrow = max(self.settings.rank, request.count)
        stages = [first]
        items, complete = _scored(found), True
        if len(found.ids):
            early, second = await self._timed(
                "early", Call(version, visitor.row, narrow, found.ids), len(found.ids), request.explain
            )
            stages.append(second)
            room = self._rank_cost.room(deadline - time.monotonic(), len(early.ids))
            complete = room == len(early.ids)
            items = _scored(early)
            final = (
                await self._rank_until(deadline, Call(version, visitor.row, items=early.ids[:room])) if room else None
            )
            complete = complete and final is not None
            if final is not None:
                ranked = _ranked(early.ids[:room], final[0])
                items = [*ranked, *items[room:]] if room < request.count else ranked
                stages.append(_report("rank", room, ranked, final[1], request.explain))
        self._log(request_id, version, stages, complete)
        return Recommendation(
            request_id=request_id,
            version=version,
            items=items[: request.count],
            complete=complete,
            stages=stages if request.explain else [],
        )

    async def _rank_until(self, deadline: float, call: Call) -> tuple[Predictions, float] | None:
        """Predictions and the seconds that they took; None where they are not there in time."""
        start = time.monotonic()
        try:
            found = await asyncio.wait_for(self._call("rank", call), max(deadline - start, 0.001))
        except asyncio.TimeoutError:
            self._rank_cost.add(len(call.items), time.monotonic() - start)
            return None
        seconds = time.monotonic() - start
        self._rank_cost.add(len(call.items), seconds)
        assert isinstance(found, Predictions)
        return found, seconds

    async def _timed(self, stage: str, call: Call, entered: int, explain: bool) -> tuple[Candidates, StageReport]:
        start = time.monotonic()
        found = await self._call(stage, call)
        assert isinstance(found, Candidates)
        self._candidates.observe(len(found.ids), {"stage": stage, "version": call.version})
        return found, _report(
            stage, entered, _scored(found) if explain else found.ids, time.monotonic() - start, explain
        )

    async def _call(self, stage: str, call: Call) -> Any:
        start = time.monotonic()
        try:
            outcome = await self._handles[stage].remote(call)
        except BackPressureError:
            raise Overloaded(self.settings.retry_after_s) from None
        if isinstance(outcome, Refused):
            raise BadRequest(outcome.message)
        self._seconds.observe(time.monotonic() - start, {"stage": stage, "version": call.version})
        return outcome

    async def _counted(self, version: str, request_id: str, work: Any) -> Any:
        """Do the work where there is room for it, and count how it ended."""
        outcome = "failed"
        if self._in_flight >= self.settings.max_requests:
            work.close()
            self._requests.inc(1, {"outcome": "overloaded", "version": version})
            raise Overloaded(self.settings.retry_after_s)
        self._in_flight += 1
        start = time.monotonic()
        try:
            result = await work
            outcome = "answered"
            return result
        except Overloaded:
            outcome = "overloaded"
            raise
        except BadRequest:
            outcome = "refused"
            raise
        finally:
            self._in_flight -= 1
            self._requests.inc(1, {"outcome": outcome, "version": version})
            self._seconds.observe(time.monotonic() - start, {"stage": "all", "version": version})

    async def _shadow(self, version: str, request: RecommendRequest, request_id: str) -> None:
        """What the shadow version would have answered: measured and logged, never shown."""
        try:
            await self._recommend(version, request, request_id)
        except (Overloaded, BadRequest) as error:
            log.warning("shadow %s did not answer request %s: %s", version, request_id, error)

    def _visitor(self, user: int | str, context: Mapping[str, Scalar], exclude: Sequence[int]) -> _Visitor:
        """The user's row of the store, null where the store does not know them, with the context beside it."""
        is_text = pa.types.is_large_string(self._users.schema.field(self._users.key).type)
        if is_text != isinstance(user, str):
            raise BadRequest(f"user: {'text' if is_text else 'an integer'} is expected")
        rows, _ = self._users.get([user])
        seen = rows["seen"][0].as_py() or [] if "seen" in rows.schema.names else []
        table = pa.Table.from_batches([rows])
        for name, value in context.items():
            if name in rows.schema.names:
                raise BadRequest(f"context: {name!r} is a column of the user store")
            table = table.append_column(name, pa.array([value]))
        return _Visitor(table, np.unique(np.array([*seen, *exclude], np.int64)))

    def _log(self, request_id: str, version: str, stages: Sequence[StageReport], complete: bool) -> None:
        facts = {stage.stage: [stage.entered, stage.left, round(stage.milliseconds, 2)] for stage in stages}
        log.info(json.dumps({"request_id": request_id, "version": version, "complete": complete, **facts}))


def _scored(found: Candidates) -> list[ScoredItem]:
    pairs = zip(found.ids.tolist(), found.scores.tolist(), strict=True)
    return [ScoredItem(item=item, score=score) for item, score in pairs]


def _ranked(ids: NDArray[np.int64], found: Predictions) -> list[ScoredItem]:
    """Best first; equal ones in the order in which they came."""
    scores = found.values[:, found.task]
    order = np.argsort(-scores, kind="stable")
    rows = zip(ids[order].tolist(), scores[order].tolist(), found.values[order].tolist(), strict=True)
    return [
        ScoredItem(item=item, score=score, predictions=dict(zip(found.tasks, values, strict=True)))
        for item, score, values in rows
    ]


def _report(stage: str, entered: int, items: Any, seconds: float, explain: bool) -> StageReport:
    return StageReport(
        stage=stage, entered=entered, left=len(items), milliseconds=1000 * seconds, items=items if explain else []
    )
