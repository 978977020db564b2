"""The deployment between the ingress and the actors of Online Matching: logs for many requests at once, and newest snapshots."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.util.metrics import Counter, Gauge

from raysys.errors import UserError
from raysys.models.retrieval.indexes.index import Ids
from raysys.serve.bandit.aggregate import Settings
from raysys.serve.bandit.cluster import OnlineMatching
from raysys.serve.bandit.feedback import Impressions, concatenate
from raysys.serve.bandit.policy import Floats, Snapshot
from raysys.serve.release import Release
from raysys.serve.settings import BanditSettings

log = logging.getLogger("ray.serve")
ACTORS = "raysys-bandit-{version}"
_BATCH = 256  # requests whose impressions are written together
_COUNTERS = ("held", "duplicates", "unmatched", "unacknowledged", "late", "discarded", "deltas")


class BanditReplica:
    """Starts the actors of each release, counts what is due every `window_s`, and keeps the newest snapshots.

    The actors outlive this replica: another one finds them. `reconfigure` says for which releases they are; those of a
    release that is no longer named are ended, and their logs stay.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = BanditSettings(**settings)
        self._bandits: dict[str, OnlineMatching] = {}
        self._snapshots: dict[str, Snapshot] = {}
        self._clock: asyncio.Task[None] | None = None
        self._written = Counter("raysys_bandit_rows", "Rows written to the log.", ("kind", "version"))
        self._facts = Gauge("raysys_bandit_facts", "Counters of the actors, summed.", ("fact", "version"))

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Serve's call with `user_config`. config: `releases`, folders by version. Raises UserError where one has no graph."""
        releases: dict[str, str] = config["releases"]
        for version, folder in releases.items():
            if version not in self._bandits:
                self._bandits[version] = await asyncio.to_thread(self._start, version, folder)
                await self._read(version)
        for version in set(self._bandits) - set(releases):
            bandit = self._bandits.pop(version)
            self._snapshots.pop(version, None)
            await asyncio.to_thread(bandit.stop)
        if self._clock is None:
            self._clock = asyncio.create_task(self._tick())

    async def check_health(self) -> None:
        """Serve's call."""
        if self._clock is not None and self._clock.done():
            raise RuntimeError("nothing is counted any more") from self._clock.exception()

    async def snapshot(self, version: str, known: str | None) -> Snapshot | None:
        """The newest snapshot of a release; None where it is the one that is known, or the release has none here."""
        newest = self._snapshots.get(version)
        return None if newest is None or newest.version == known else newest

    async def impress(self, version: str, impressions: Impressions) -> bool:
        """Write what was shown; whether this release is here. On disk when it returns."""
        if version not in self._bandits:
            return False
        await self._impress((version, impressions))
        return True

    async def reward(self, version: str, ids: Ids, rewards: Floats) -> bool:
        """Write rewards [n] of impressions [n]; whether this release is here. On disk when it returns."""
        if version not in self._bandits:
            return False
        await asyncio.to_thread(self._bandits[version].reward, ids, rewards, time.time())
        self._written.inc(len(ids), {"kind": "rewards", "version": version})
        return True

    def _start(self, version: str, folder: str) -> OnlineMatching:
        given, graph = self._settings, Release.open(folder).graph()
        settings = Settings(
            name=ACTORS.format(version=version),
            folder=str(Path(given.folder) / version),
            shards=given.shards,
            ridge=given.ridge,
            window_s=given.window_s,
            horizon_s=given.horizon_s,
            join_s=given.join_s,
        )
        bandit = OnlineMatching.start(settings)
        if not bandit.has_graph():
            bandit.refresh(graph, threshold=1.0, now=time.time())
        return bandit

    @serve.batch(max_batch_size=_BATCH, batch_wait_timeout_s=0.0, max_concurrent_batches=1)
    async def _impress(self, requests: list[tuple[str, Impressions]]) -> list[None]:
        """What comes while one batch is written waits for the next: the disk sets the pace."""
        for version in {version for version, _ in requests}:
            together = concatenate([shown for of, shown in requests if of == version])
            if version in self._bandits:  # its release may have gone meanwhile
                await asyncio.to_thread(self._bandits[version].impress, together)
                self._written.inc(len(together), {"kind": "impressions", "version": version})
        return [None] * len(requests)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._settings.window_s)
            for version, bandit in list(self._bandits.items()):
                try:
                    await asyncio.to_thread(bandit.flush, time.time())
                    await self._read(version)
                except (ray.exceptions.RayError, UserError, KeyError) as error:
                    if self._bandits.get(version) is bandit:
                        log.error("Online Matching of release %s: %s", version, error)

    async def _read(self, version: str) -> None:
        bandit = self._bandits[version]
        self._snapshots[version] = await asyncio.to_thread(bandit.snapshot, time.time())
        facts = await asyncio.to_thread(bandit.facts)
        for name in _COUNTERS:
            total = sum(actor.get(name, 0) for actors in facts.values() for actor in actors)
            self._facts.set(total, {"fact": name, "version": version})
