"""The ingress: whom which release answers, what a replica takes on, and what it counts and logs."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Coroutine, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.util.metrics import Counter, Histogram

from raysys.data.catalogue import catalogue_of
from raysys.errors import UserError, nearest
from raysys.serve.answers import ranked, read_impression, scored
from raysys.serve.bandit.explorer import Explorer
from raysys.serve.bandit.feedback import Impressions
from raysys.serve.funnel import Funnel, Passage
from raysys.serve.items import ItemTable
from raysys.serve.messages import (
    FeedbackAnswer,
    FeedbackRequest,
    ItemsRequest,
    Models,
    Ranking,
    RankRequest,
    Recommendation,
    RecommendRequest,
    RetrieveRequest,
    Rows,
    VersionFacts,
)
from raysys.serve.plan import Plan
from raysys.serve.problems import BadRequest, Overloaded, Unavailable
from raysys.serve.release import Release
from raysys.serve.replica import SECONDS, Refused
from raysys.serve.settings import BanditSettings, CascadeSettings
from raysys.serve.stages import Call
from raysys.serve.users import SEEN
from raysys.serve.visitors import Visitors
from raysys.strict_json import to_plain

log = logging.getLogger("ray.serve")
COUNTS = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0]
_ATTEMPTS = 2  # of a call to a stage: its replica may die under it, and calls change nothing
_LOG_ATTEMPTS, _LOG_PAUSE_S = 30, 1.0  # to write impressions, while Online Matching is being restarted


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
        bandit: DeploymentHandle | None = None,
        bandit_settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.settings = CascadeSettings(**settings)
        self._handles = {"retrieve": retriever, "early": early, "rank": ranker}
        self._visitors = Visitors(self.settings.users, self.settings.retry_after_s)
        self._explorer = None if bandit is None else Explorer(BanditSettings(**(bandit_settings or {})), bandit)
        self._funnel = Funnel(self.settings, self._call, self._explorer)
        self._plan: Plan | None = None
        self._in_flight = 0
        self._aside: set[asyncio.Task[None]] = set()  # shadows, and impressions that are being written
        self._clock: asyncio.Task[None] | None = None
        self._seconds = Histogram("raysys_request_seconds", "Latency.", SECONDS, ("stage", "version"))
        self._requests = Counter("raysys_requests", "Requests by how they ended.", ("outcome", "version"))
        self._candidates = Histogram("raysys_candidates", "Items that a stage passed on.", COUNTS, ("stage", "version"))
        self._lost = Counter("raysys_impressions_lost", "Impressions that could not be written.", ("version",))

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Serve's call with `user_config`: the plan, in one assignment, and the newest rows of users."""
        plan = Plan.from_config(config)
        await self._visitors.refresh()
        if self._explorer is not None:
            await self._explorer.refresh(plan.releases)
        self._plan = plan
        if self._clock is None:
            self._clock = asyncio.create_task(self._tick())

    def check_health(self) -> None:
        """Serve's call. That the stages compute is what their own checks say."""
        if self._plan is None:
            raise RuntimeError("no plan")
        if self._clock is not None and self._clock.done():
            raise RuntimeError("nothing is refreshed any more")

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
        passage: Passage = await self._counted(version, self._recommend(version, request, request_id))
        if plan.shadow is not None and plan.shadow != version:
            self._do_aside(self._shadow(plan.shadow, request, request_id))
        return Recommendation(
            request_id=request_id,
            version=version,
            items=passage.items,
            complete=passage.complete,
            explored=passage.explored,
            stages=passage.stages if request.explain else [],
        )

    async def retrieve(self, request: RetrieveRequest, request_id: str) -> Ranking:
        """Candidates alone."""
        version = self.plan.assign(request.user)
        visitor = await self._visitors.visitor(request.user, request.context, request.exclude)
        call = Call(version, visitor.row, request.count, exclude=visitor.left_out)
        found = await self._counted(version, self._call("retrieve", call))
        return Ranking(request_id=request_id, version=version, items=scored(found))

    async def rank(self, requests: Sequence[RankRequest], request_id: str) -> list[Ranking]:
        """Predictions for the items of each request, best first."""
        return list(await asyncio.gather(*(self._rank_one(request, request_id) for request in requests)))

    async def feedback(self, request: FeedbackRequest, request_id: str) -> FeedbackAnswer:
        """Rewards for Online Matching, on disk when this returns."""
        if self._explorer is None:
            raise BadRequest("this deployment takes no feedback: serve.bandit is null")
        by_version: dict[str, tuple[list[int], list[float]]] = {}
        for place, reward in enumerate(request.rewards):
            impression = read_impression(reward.impression)
            if impression is None:
                raise BadRequest(f"rewards.{place}.impression: not the name of an impression")
            ids, rewards = by_version.setdefault(impression[0], ([], []))
            ids.append(impression[1])
            rewards.append(reward.reward)
        for version, (ids, rewards) in by_version.items():
            try:
                known = await self._explorer.reward(version, ids, rewards)
            except (RayActorError, DeploymentUnavailableError, BackPressureError):
                raise Unavailable("feedback cannot be written now", self.settings.retry_after_s) from None
            if not known:
                raise BadRequest("rewards: the release of an impression is no longer served")
        return FeedbackAnswer(request_id=request_id, accepted=len(request.rewards))

    async def user(self, name: str) -> Rows:
        """What the user store has of a user; no row where it does not know them."""
        user = self._visitors.parse(name)
        row, found = await self._visitors.row(user)
        columns = await asyncio.to_thread(_item_columns, self.plan.releases[self.plan.assign(user)])
        return Rows(
            key=self._visitors.key,
            rows=to_plain(row.to_pylist()) if found else [],
            item_columns=[column for column in columns if column in row.schema.names],
        )

    async def some_users(self, count: int) -> Rows:
        """Users to choose from, by their keys alone."""
        keys = await self._visitors.some(count)
        return Rows(key=self._visitors.key, rows=[{self._visitors.key: key} for key in keys])

    async def items(self, request: ItemsRequest) -> Rows:
        """What the item table of a release has of these items."""
        folder = self.plan.releases.get(request.version)
        if folder is None:
            raise BadRequest(f"version: {nearest(request.version, self.plan.releases) or 'no such release is served'}")
        table = await asyncio.to_thread(_item_table, folder)
        rows = table.take(np.array(request.items, np.int64))
        return Rows(key=table.key, rows=to_plain(rows.to_pylist()))

    async def _recommend(self, version: str, request: RecommendRequest, request_id: str, learn: bool = True) -> Passage:
        visitor = await self._visitors.visitor(request.user, request.context, request.exclude)
        passage = await self._funnel.run(version, visitor, request, request_id, learn)
        for stage in passage.stages:
            self._candidates.observe(stage.left, {"stage": stage.stage, "version": version})
        if passage.impressions is not None:
            written = self._do_aside(self._write(version, passage.impressions))
            await asyncio.wait([written], timeout=max(passage.deadline - time.monotonic(), 0))
        facts = {stage.stage: [stage.entered, stage.left, round(stage.milliseconds, 2)] for stage in passage.stages}
        log.info(json.dumps({"request_id": request_id, "version": version, "complete": passage.complete, **facts}))
        return passage

    async def _rank_one(self, request: RankRequest, request_id: str) -> Ranking:
        version = self.plan.assign(request.user)
        visitor = await self._visitors.visitor(request.user, request.context, [])
        ids = np.array(request.items, np.int64)
        call = Call(version, visitor.row, items=ids, request_id=request_id)
        found = await self._counted(version, self._call("rank", call))
        return Ranking(request_id=request_id, version=version, items=ranked(ids, found))

    async def _call(self, stage: str, call: Call) -> Any:
        start = time.monotonic()
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                outcome = await self._handles[stage].remote(call)
                break
            except BackPressureError:
                raise Overloaded(self.settings.retry_after_s) from None
            except (RayActorError, DeploymentUnavailableError) as error:
                log.warning("stage %s, attempt %d: %s", stage, attempt, type(error).__name__)
                if attempt == _ATTEMPTS:
                    raise Unavailable(f"stage {stage} is being restarted", self.settings.retry_after_s) from None
        if isinstance(outcome, Refused):
            raise BadRequest(outcome.message)
        self._seconds.observe(time.monotonic() - start, {"stage": stage, "version": call.version})
        return outcome

    async def _counted(self, version: str, work: Coroutine[Any, Any, Any]) -> Any:
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
        except Unavailable:
            outcome = "unavailable"
            raise
        except BadRequest:
            outcome = "refused"
            raise
        finally:
            self._in_flight -= 1
            self._requests.inc(1, {"outcome": outcome, "version": version})
            self._seconds.observe(time.monotonic() - start, {"stage": "all", "version": version})

    def _do_aside(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._aside.add(task)
        task.add_done_callback(self._aside.discard)
        return task

    async def _shadow(self, version: str, request: RecommendRequest, request_id: str) -> None:
        """What the shadow version would have answered: measured and logged, never shown."""
        try:
            await self._recommend(version, request, request_id, learn=False)
        except (Unavailable, BadRequest) as error:
            log.warning("shadow %s did not answer request %s: %s", version, request_id, error)

    async def _write(self, version: str, impressions: Impressions) -> None:
        """Log what was shown. While that is not possible requests wait for it until their deadlines, and so come more slowly."""
        assert self._explorer is not None
        for _ in range(_LOG_ATTEMPTS if len(self._aside) <= 4 * self.settings.max_requests else 1):
            try:
                return await self._explorer.log(version, impressions)
            except (RayActorError, DeploymentUnavailableError, BackPressureError) as error:
                log.warning("impressions are not written yet: %s", type(error).__name__)
                await asyncio.sleep(_LOG_PAUSE_S)
        self._lost.inc(len(impressions), {"version": version})
        log.error("%d impressions of release %s are lost", len(impressions), version)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self.settings.refresh_s)
            try:
                await self._visitors.refresh()
                if self._explorer is not None:
                    await self._explorer.refresh(self.plan.releases)
            except (UserError, OSError, RayActorError, DeploymentUnavailableError, BackPressureError) as error:
                log.error("what was read before stays: %s", error)


@lru_cache(maxsize=4)
def _item_table(folder: str) -> ItemTable:
    return Release.open(folder).items()


@lru_cache(maxsize=4)
def _item_columns(folder: str) -> tuple[str, ...]:
    """The columns of users that list items."""
    schema = Release.open(folder).bundle("final_ranker").schema
    key = catalogue_of(schema).key
    table = next((feature.table for feature in schema.sparse if feature.name == key), None)
    return (*(feature.name for feature in schema.sequence_features if feature.table == table), SEEN)
