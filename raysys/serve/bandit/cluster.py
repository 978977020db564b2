"""Online Matching on Ray: its actors, found by name from every process, and what a replica or a job does with them.

bandit = OnlineMatching.start(settings)                  # the actors, or those that run already
bandit.refresh(build_graph(users, index, clusters=1024, width=50), threshold=0.9, now=time.time())
snapshot = bandit.snapshot(now=time.time())              # in each replica, on an interval
shown = recommend(snapshot, users, policy, count=10, generator=generator)
bandit.impress(to_impressions(shown, ids, time.time()))
bandit.reward(ids, rewards, now=time.time())             # on disk when it returns
bandit.flush(now=time.time())                            # on an interval, from anywhere
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray

from raysys.data.hashing import mix, spread
from raysys.errors import UserError
from raysys.models.retrieval.indexes.index import Ids, Vectors
from raysys.serve.bandit.aggregate import Aggregator, Collector, Delivery, Part, Settings
from raysys.serve.bandit.build import carry_over
from raysys.serve.bandit.edges import Statistics
from raysys.serve.bandit.feedback import Impressions, check_rewards
from raysys.serve.bandit.graph import Graph, insert_items, join_graphs
from raysys.serve.bandit.policy import Floats, Snapshot

NAMESPACE = "raysys"
_ATTEMPTS = 10  # to read parts of one version while graphs come faster than they are read


class OnlineMatching:
    """Handles of the actors. Calls wait for an actor that is being restarted; repeating any of them changes nothing.

    Times `now` are unix seconds. One process at a time may refresh and insert; the others may do everything else.
    """

    def __init__(self, aggregators: Sequence[Any], collectors: Sequence[Any]) -> None:
        self._aggregators, self._collectors = list(aggregators), list(collectors)

    @classmethod
    def start(cls, settings: Settings) -> OnlineMatching:
        """Start the actors, or find those of this name, which keep the settings that they were started with.

        They outlive this process, until `stop`. Raises UserError where a folder belongs to other settings, or is damaged.
        """

        def actor(kind: type, number: int, *arguments: Any) -> Any:
            options: dict[str, Any] = {
                "name": f"{settings.name}-{kind.__name__.lower()}-{number}",
                "namespace": NAMESPACE,
                "get_if_exists": True,
                "lifetime": "detached",
                "max_restarts": -1,
                "max_task_retries": -1,  # calls may be repeated
                "num_cpus": 0,
            }
            return ray.remote(kind).options(**options).remote(settings, number, *arguments)

        aggregators = [actor(Aggregator, shard) for shard in range(settings.shards)]
        _answers([aggregator.facts.remote() for aggregator in aggregators])
        send = Delivery(aggregators)
        collectors = [actor(Collector, number, send) for number in range(settings.collectors)]
        _answers([collector.facts.remote() for collector in collectors])
        return cls(aggregators, collectors)

    def has_graph(self) -> bool:
        """Whether there was a `refresh` that every shard has."""
        return self._versions()[0] is not None

    def snapshot(self, now: float) -> Snapshot:
        """The newest version of the graph that every shard has, with its statistics as of `now`.

        There is no coordinator: a shard keeps the graph before, so that all have one in common while they go on to the next.
        Raises UserError before the first `refresh`.
        """
        for _ in range(_ATTEMPTS):
            base, _ = self._versions()
            if base is None:
                raise UserError(
                    "Online Matching has no graph yet", "call refresh with one, and again if it was interrupted"
                )
            parts = ray.get([aggregator.part.remote(base, now) for aggregator in self._aggregators])
            if None not in parts:
                return join_parts(parts)
        raise RuntimeError(f"{_ATTEMPTS} times a shard had gone on to another graph while it was read")

    def refresh(self, graph: Graph, threshold: float, now: float) -> int:
        """Go on to a graph that was built anew; the version that it gets. See `carry_over` for `threshold`."""
        return self._publish(lambda old: graph if old is None else carry_over(old, graph, threshold), now)

    def insert(self, items: Ids, vectors: Vectors, clusters_per_item: int, now: float) -> int:
        """Offer new items from now on; the version of the graph. See `insert_items`. Raises UserError before the first `refresh`."""

        def add(old: Graph | None) -> Graph:
            if old is None:
                raise UserError("Online Matching has no graph yet", "call refresh with one before items are inserted")
            return insert_items(old, items, vectors, clusters_per_item)

        return self._publish(add, now)

    def impress(self, impressions: Impressions) -> None:
        """Log what was shown. Give many at once: each call waits for the disk."""
        impressions = impressions.check()
        place = self._collector_of(impressions.id)
        calls = [
            self._collectors[number].impress.remote(impressions.take(place == number))
            for number in np.unique(place).tolist()
        ]
        _answers(calls)

    def reward(self, ids: Ids, rewards: Floats, now: float) -> None:
        """Log rewards [n], in [0, 1], of impressions [n]; when this returns they will be counted, once. Raises UserError."""
        ids, rewards = check_rewards(ids, rewards)
        place = self._collector_of(ids)
        calls = [
            self._collectors[number].reward.remote(ids[place == number], rewards[place == number], now)
            for number in np.unique(place).tolist()
        ]
        _answers(calls)

    def flush(self, now: float) -> None:
        """Count what is due; see `Collector.flush`."""
        _answers([collector.flush.remote(now) for collector in self._collectors])

    def facts(self) -> dict[str, list[dict[str, Any]]]:
        """What each actor says of itself: its process, versions, and counters, for metrics."""
        return {
            "aggregators": ray.get([aggregator.facts.remote() for aggregator in self._aggregators]),
            "collectors": ray.get([collector.facts.remote() for collector in self._collectors]),
        }

    def stop(self) -> None:
        """End the actors. Their folders stay, and `start` goes on with them."""
        for actor in [*self._collectors, *self._aggregators]:
            ray.kill(actor)

    def _versions(self) -> tuple[int | None, int]:
        """The newest version that all shards have, and the newest that one has."""
        versions = ray.get([aggregator.versions.remote() for aggregator in self._aggregators])
        common = set.intersection(*(set(known) for known in versions))
        return max(common, default=None), max((max(known, default=0) for known in versions), default=0)

    def _publish(self, make: Callable[[Graph | None], Graph], now: float) -> int:
        base, newest = self._versions()
        graph = make(None if base is None else self.snapshot(now).graph)
        # Microseconds, so that of two processes that refresh at once neither takes the other's graph for its own.
        graph = replace(graph, version=max(newest + 1, int(now * 1e6)))
        shards = len(self._aggregators)
        calls = [
            aggregator.set_graph.remote(graph.part(shard, shards), base, now)
            for shard, aggregator in enumerate(self._aggregators)
        ]
        _answers(calls)
        return graph.version

    def _collector_of(self, ids: Ids) -> Ids:
        return spread(mix(ids.astype(np.uint64)), len(self._collectors))


def join_parts(parts: Sequence[Part]) -> Snapshot:
    """The snapshot of parts of one version."""
    graph, edges = join_graphs([part.graph for part in parts])
    columns = [
        np.concatenate([getattr(part.statistics, name) for part in parts])[edges] for name in ("d", "b", "n", "r")
    ]
    version = f"{graph.version}:{'.'.join(str(part.deltas) for part in parts)}"
    return Snapshot(version, graph, Statistics(*columns))


def _answers(calls: Sequence[Any]) -> list[Any]:
    """What calls return. Raises the UserError that one of them, or the start of its actor, raised."""
    try:
        return ray.get(list(calls))
    except ray.exceptions.ActorDiedError as error:  # has the error of a start as text alone
        message, _, hint = str(error).partition("UserError: ")[2].partition("\n  hint: ")
        raise (UserError(message, hint.splitlines()[0]) if hint else error) from None
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise (UserError(cause.message, cause.hint) if isinstance(cause, UserError) else error) from None
