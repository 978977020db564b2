"""Online Matching in a replica of the ingress: snapshots by release, what they offer a user, and what is logged of an answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from ray.serve.handle import DeploymentHandle

from raysys.models.retrieval.indexes.index import NO_ITEM, Ids, Vectors
from raysys.serve.bandit.feedback import Impressions, concatenate, to_impressions
from raysys.serve.bandit.policy import Recommendations, Snapshot, edges_of_items, recommend
from raysys.serve.plan import point_of
from raysys.serve.settings import BanditSettings

NOTHING = np.zeros(0, np.int64)


class Explorer:
    """Answers from the snapshot that it has; `refresh` takes the newest one. A release without one has no offers."""

    def __init__(self, settings: BanditSettings, bandit: DeploymentHandle) -> None:
        self._settings, self._bandit = settings, bandit
        self._snapshots: dict[str, Snapshot] = {}
        self._shown: dict[str, Counter[int]] = {}  # explored items by release, since its snapshot
        self._generator = np.random.default_rng()

    async def refresh(self, versions: Iterable[str]) -> None:
        """Take the newest snapshots of these releases, and drop those of others."""
        wanted = set(versions)
        for version in wanted:
            known = self._snapshots.get(version)
            newest = await self._bandit.snapshot.remote(version, known and known.version)
            if newest is not None:
                self._snapshots[version], self._shown[version] = newest, Counter()
        for version in set(self._snapshots) - wanted:
            del self._snapshots[version], self._shown[version]

    def exploit(self, version: str, user: Vectors, exclude: Ids) -> tuple[Ids, Vectors]:
        """Up to `candidates` items [n] of the highest means [n] above 0 for a user's vector [K], without those of `exclude`."""
        snapshot = self._snapshots.get(version)
        if snapshot is None or not self._settings.candidates:
            return NOTHING, np.zeros(0, np.float32)
        found = self._recommend(snapshot, user, self._settings.candidates, exclude, explore=False)
        is_there = (found.item[0] != NO_ITEM) & (found.score[0] > 0)
        return found.item[0][is_there], found.score[0][is_there].astype(np.float32)

    def explore(self, version: str, name: int | str, user: Vectors, exclude: Ids) -> Recommendations | None:
        """Items for the `slots`, [1, n]; None for a user outside of `share`, or where there is none to explore."""
        snapshot = self._snapshots.get(version)
        if snapshot is None or not self._settings.slots or point_of(name, "explore") >= self._settings.share:
            return None
        shown = self._shown[version]
        often = [item for item, times in shown.items() if times >= self._settings.max_impressions]
        found = self._recommend(
            snapshot, user, self._settings.slots, np.concatenate([exclude, np.array(often, np.int64)]), explore=True
        )
        items = found.item[0][found.item[0] != NO_ITEM].tolist()
        shown.update(items)
        return found if items else None

    def impressions(
        self, version: str, user: Vectors, items: Ids, explored: Recommendations | None, now: float
    ) -> Impressions | None:
        """What is logged of an answer: its items [n], then the explored ones; None where the release has no snapshot.

        The items of the final order teach Online Matching, too, where they have an edge to one of the user's clusters.
        """
        snapshot = self._snapshots.get(version)
        if snapshot is None:
            return None
        cluster, weight = edges_of_items(snapshot, user[None], items[None], self._settings.policy)
        own = Impressions(
            id=self._new_ids(items),
            time=np.full(len(items), now),
            item=items,
            cluster=cluster[0],
            weight=weight[0],
            graph=np.full(len(items), snapshot.graph.version),
            propensity=np.ones(len(items)),
            position=np.arange(len(items)),
        )
        if explored is None:
            return own
        return concatenate([own, to_impressions(explored, self._new_ids(explored.item), now)])

    async def log(self, version: str, impressions: Impressions) -> None:
        """On disk when it returns."""
        await self._bandit.impress.remote(version, impressions)

    async def reward(self, version: str, ids: Sequence[int], rewards: Sequence[float]) -> bool:
        """On disk when it returns; whether this release learns."""
        arrays = np.array(ids, np.int64), np.array(rewards, np.float64)
        known: bool = await self._bandit.reward.remote(version, *arrays)
        return known

    def _recommend(
        self, snapshot: Snapshot, user: Vectors, count: int, exclude: Ids, *, explore: bool
    ) -> Recommendations:
        return recommend(
            snapshot,
            user[None],
            self._settings.policy,
            count=count,
            explore=explore,
            exclude=exclude,
            generator=self._generator,
        )

    def _new_ids(self, items: Ids) -> Ids:
        return self._generator.integers(0, 2**63 - 1, items.shape, dtype=np.int64)
