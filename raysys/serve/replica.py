"""A replica of a stage: releases held in memory by version, and calls answered in batches."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from ray import serve
from ray.util.metrics import Gauge, Histogram

from raysys.bundle import ALLOWED_TARGETS
from raysys.errors import UserError, first_line
from raysys.serve.release import Release
from raysys.serve.served_log import ServedLog
from raysys.serve.settings import BatchSettings, ServedLogSettings
from raysys.serve.stages import Call, Candidates, Predictions, RankerStage, Stage

log = logging.getLogger("ray.serve")

SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]
SIZES = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0]
SHARES = [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99]


@dataclass(frozen=True)
class Refused:
    """The request was at fault, and why."""

    message: str


class StageReplica:
    """Loads releases as `reconfigure` is told, and computes batches in one thread of its own, beside the event loop.

    A release that cannot be loaded is left out and named in the log; those that are there stay.
    """

    def __init__(
        self,
        kind: type[Stage],
        settings: Mapping[str, Any],
        allowed: Sequence[str] = ALLOWED_TARGETS,
        served_log: Mapping[str, Any] | None = None,
    ) -> None:
        checked = BatchSettings(**settings)
        self._kind, self._threads, self._allowed = kind, checked.threads, tuple(allowed)
        self._served = None if served_log is None else ServedLog(ServedLogSettings(**served_log))
        self._stages: dict[str, Stage] = {}
        self._probes: dict[str, Call] = {}
        self._thread = ThreadPoolExecutor(1, "model", torch.set_num_threads, (checked.threads,))
        stage = serve.get_replica_context().deployment
        self._seconds = Histogram("raysys_stage_seconds", "Computing a batch.", SECONDS, ("stage",))
        self._sizes = Histogram("raysys_batch_size", "Calls of a batch.", SIZES, ("stage",))
        self._loaded = Gauge("raysys_release_loaded", "1 for a release in memory.", ("stage", "version"))
        self._scores = Histogram("raysys_score", "The score of the best item.", SHARES, ("stage", "version"))
        for metric in (self._seconds, self._sizes, self._loaded, self._scores):
            metric.set_default_tags({"stage": stage})
        self._batch.set_max_batch_size(checked.max_batch_size)  # type: ignore[attr-defined]
        self._batch.set_batch_wait_timeout_s(checked.wait_ms / 1000)  # type: ignore[attr-defined]

    async def __call__(self, call: Call) -> Candidates | Predictions | Refused:
        """What the stage makes of a call."""
        outcome: Candidates | Predictions | Refused = await self._batch(call)
        return outcome

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Serve's call with `user_config`. config: `releases`, folders by version: just these are in memory afterwards."""
        releases: dict[str, str] = config["releases"]
        for version, folder in releases.items():
            if version not in self._stages:
                try:
                    await self._in_thread(self._load, version, folder)
                except UserError as error:
                    if not self._stages:
                        raise
                    log.error("release %s is not loaded: %s", version, error)
        for version in set(self._stages) - set(releases):
            del self._stages[version], self._probes[version]
            self._loaded.set(0, {"version": version})

    async def check_health(self) -> None:
        """Serve's call: every release in memory computes an answer."""
        for version, probe in list(self._probes.items()):
            outcome = (await self._in_thread(self._answer, [probe]))[0]
            if isinstance(outcome, Refused):
                raise RuntimeError(f"release {version} does not answer: {outcome.message}")

    def _load(self, version: str, folder: str) -> None:
        release = Release.open(folder)
        if release.version != version:
            raise UserError(f"{folder} is release {release.version!r}, not {version!r}", "correct the plan")
        self._stages[version] = self._kind(release, self._threads, (*ALLOWED_TARGETS, *self._allowed))
        # anybody, of whom nothing is known
        self._probes[version] = Call(version, pa.table({"": pa.nulls(1)}), 1, release.items().keys[:1])
        self._loaded.set(1, {"version": version})

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    @serve.batch
    async def _batch(self, calls: list[Call]) -> list[Any]:
        start = time.perf_counter()
        outcomes: list[Any] = await self._in_thread(self._answer, calls)
        self._seconds.observe(time.perf_counter() - start)
        self._sizes.observe(len(calls))
        for call, outcome in zip(calls, outcomes, strict=True):
            if isinstance(outcome, Predictions):
                self._scores.observe(float(outcome.values[:, outcome.task].max()), {"version": call.version})
        return outcomes

    def _answer(self, calls: Sequence[Call]) -> list[Any]:
        outcomes: list[Any] = [None] * len(calls)
        for version in {call.version for call in calls}:
            places = [place for place, call in enumerate(calls) if call.version == version]
            for place, outcome in zip(places, self._try([calls[place] for place in places]), strict=True):
                outcomes[place] = outcome
        return outcomes

    def _log_sample(self, stage: Stage, call: Call, outcome: Candidates | Predictions) -> None:
        if self._served is None or not isinstance(stage, RankerStage) or not self._served.wants(call.request_id):
            return
        assert isinstance(outcome, Predictions)
        self._served.add(call.request_id, call.version, stage.rows(call.user, [call.items]), outcome)

    def _try(self, calls: Sequence[Call]) -> list[Any]:
        """Of one version. Where one call is at fault, each is computed by itself: the others get their answers."""
        if calls[0].version not in self._stages:
            return [Refused(f"release {calls[0].version} is not loaded")] * len(calls)
        try:
            users = pa.concat_tables([call.user for call in calls], promote_options="permissive")
            stage = self._stages[calls[0].version]
            outcomes = list(stage.answer(users, calls))
            for call, outcome in zip(calls, outcomes, strict=True):
                self._log_sample(stage, call, outcome)
            return outcomes
        except (UserError, pa.ArrowException) as error:
            if len(calls) == 1:
                return [Refused(first_line(error))]
            return [self._try([call])[0] for call in calls]
