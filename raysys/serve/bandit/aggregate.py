"""Feedback counted exactly once by Ray actors, and snapshots of what they count.

Aggregators hold the edge sums of Diag-LinUCB, each those of the clusters of its shard. Collectors join impressions with rewards
and send deltas to the aggregators. Both write what they are told to a synchronised log before they answer, and an actor that
was killed is restarted by Ray and reads it again. A delta that was sent twice is known by its number (ours throughout: Yi et
al. 2023 is not known to say how feedback is counted once).
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from raysys.errors import UserError, check_count
from raysys.models.retrieval.indexes.index import Ids
from raysys.serve.bandit.edges import GRAPH_ARRAYS, Decay, Delta, EdgeSums, Statistics
from raysys.serve.bandit.feedback import Impressions, Joiner, check_rewards
from raysys.serve.bandit.graph import Graph, shard_of
from raysys.serve.bandit.journal import Journal, Record
from raysys.serve.bandit.policy import Floats


@dataclass(frozen=True)
class Settings:
    """What aggregators and collectors are started with.

    name: of this bandit among those of a cluster. folder: where logs are; an actor that is restarted on another machine must
    find it there. shards, collectors: numbers of actors; they, and decay.bucket_s, stay what they were when the folder was
    made. ridge: λ. window_s: seconds between two deltas of a collector. compact_bytes: size of a log from which on a state
    is written in its place. The others: see `EdgeSums` and `Joiner`.
    """

    name: str
    folder: str
    shards: int = 2
    collectors: int = 1
    ridge: float = 1.0
    grace_s: float = 3600.0
    decay: Decay | None = None
    horizon_s: float = 0.0
    join_s: float = 3600.0
    window_s: float = 5.0
    compact_bytes: int = 64 * 2**20

    def __post_init__(self) -> None:
        check_count("shards", self.shards)
        check_count("collectors", self.collectors)

    @property
    def bucket_s(self) -> float | None:
        """Seconds of a bucket, None without decay."""
        return None if self.decay is None else self.decay.bucket_s


@dataclass(frozen=True)
class Part:
    """What one shard knows of one version of the graph: its clusters, and statistics of their edges. deltas: counted so far."""

    graph: Graph
    statistics: Statistics
    deltas: int


class Aggregator:
    """The edge sums of one shard with their log. What a call did is on disk when it returns."""

    def __init__(self, settings: Settings, shard: int) -> None:
        """Open the shard's folder, or make it. Raises UserError where it is that of another shard, or damaged."""
        self._sums = EdgeSums(ridge=settings.ridge, grace_s=settings.grace_s, decay=settings.decay)
        facts = {"shard": shard, "shards": settings.shards, "bucket_s": settings.bucket_s}
        self._log = _Log(
            Path(settings.folder, f"aggregator-{shard:04d}"), settings.compact_bytes, facts, self._sums.state
        )
        for record in self._log.recover():
            if record.kind == "state":
                self._sums.restore(record.facts, record.arrays)
            else:
                self._replay(record)

    def set_graph(self, graph: Graph, base: int | None, now: float) -> None:
        """See `EdgeSums.set_graph`."""
        if not self._sums.check_next(graph.version, base):
            return  # a call that is repeated
        facts = {"version": graph.version, "next_cluster": graph.next_cluster, "base": base, "now": now}
        self._do(Record("graph", facts, {name: getattr(graph, name) for name in GRAPH_ARRAYS}))

    def apply(self, worker: str, sequence: int, delta: Delta, now: float) -> None:
        """See `EdgeSums.apply`. That it returns is the acknowledgement."""
        facts = {"worker": worker, "sequence": sequence, "now": now}
        arrays = {"cluster": delta.cluster, "item": delta.item, "bucket": delta.bucket, "sums": delta.sums}
        self._do(Record("delta", facts, arrays))

    def versions(self) -> list[int]:
        """Of the graphs that `part` can be asked for."""
        return self._sums.versions

    def part(self, version: int, now: float) -> Part | None:
        """The statistics as of `now`, or None where this version is gone."""
        if version not in self._sums.versions:
            return None
        graph = self._sums.graphs[self._sums.versions.index(version)]
        return Part(graph, self._sums.statistics(version, now), self._sums.deltas)

    def facts(self) -> dict[str, Any]:
        """The process and the counters of `EdgeSums`, for metrics."""
        sums = self._sums
        counters = {"deltas": sums.deltas, "late": sums.late, "discarded": sums.discarded, "expired": sums.expired}
        return {"pid": os.getpid(), "versions": sums.versions, **counters}

    def _do(self, record: Record) -> None:
        self._log.append(record)
        self._replay(record)
        self._log.compact_if_large()

    def _replay(self, record: Record) -> None:
        facts, arrays = record.facts, record.arrays
        if record.kind == "graph":
            graph = Graph(facts["version"], facts["next_cluster"], *(arrays[name] for name in GRAPH_ARRAYS))
            self._sums.set_graph(graph, facts["base"], facts["now"])
        else:
            delta = Delta(arrays["cluster"], arrays["item"], arrays["bucket"], arrays["sums"])
            self._sums.apply(facts["worker"], facts["sequence"], delta, facts["now"])


@dataclass(frozen=True)
class Message:
    """A delta for one shard, known by (worker, sequence) there."""

    shard: int
    worker: str
    sequence: int
    delta: Delta


class Collector:
    """Joins impressions with rewards, and sends what is to be counted. What a call was told is on disk when it returns."""

    def __init__(self, settings: Settings, number: int, send: Callable[[Sequence[Message], float], None]) -> None:
        """send: messages and the time now; it returns when all of them were acknowledged."""
        self._settings, self._send = settings, send
        self._joiner = Joiner(horizon_s=settings.horizon_s, join_s=settings.join_s, decay=settings.decay)
        self._sequences = [0] * settings.shards
        self._outbox: list[Message] = []  # flushed, and not known to be acknowledged
        self._flushed: float | None = None
        self._worker = uuid.uuid4().hex  # of a new folder; another one would have numbers that were used before
        folder = Path(settings.folder, f"collector-{number:04d}")
        facts: dict[str, Any] = {"collector": number, "collectors": settings.collectors}
        facts |= {"shards": settings.shards, "bucket_s": settings.bucket_s}
        self._log = _Log(folder, settings.compact_bytes, facts, self._state)
        for record in self._log.recover():
            self._replay(record)
        if self._log.is_new:
            self._do(Record("worker", {"worker": self._worker}, {}))

    def impress(self, impressions: Impressions) -> None:
        """Take impressions. The same ones may be given again."""
        self._do(Record("impressions", {}, impressions.check().to_arrays()))

    def reward(self, ids: Ids, rewards: Floats, now: float) -> None:
        """Take rewards [n], in [0, 1], of impressions [n]. The same ones may be given again. That it returns is the acknowledgement."""
        ids, rewards = check_rewards(ids, rewards)
        self._do(Record("rewards", {"now": now}, {"id": ids, "reward": rewards}))

    def flush(self, now: float) -> None:
        """Send what there is to count; nothing is done within `window_s` of the flush before."""
        self._deliver(now)
        if self._flushed is None or now >= self._flushed + self._settings.window_s:
            self._do(Record("flush", {"now": now}, {}))
            self._deliver(now)

    def facts(self) -> dict[str, Any]:
        """The process, what waits, and the counters of `Joiner`, for metrics."""
        joiner = self._joiner
        counters = {"held": len(joiner), "duplicates": joiner.duplicates, "unmatched": joiner.unmatched}
        return {"pid": os.getpid(), "unacknowledged": len(self._outbox), **counters}

    def _deliver(self, now: float) -> None:
        if self._outbox:
            self._send(self._outbox, now)
            self._do(Record("acknowledged", {}, {}))

    def _do(self, record: Record) -> None:
        self._log.append(record)
        self._replay(record)
        if not self._outbox:  # a state has no messages
            self._log.compact_if_large()

    def _replay(self, record: Record) -> None:
        facts, arrays = record.facts, record.arrays
        if record.kind == "impressions":
            self._joiner.impress(Impressions(**arrays))
        elif record.kind == "rewards":
            self._joiner.reward(arrays["id"], arrays["reward"], facts["now"])
        elif record.kind == "flush":
            self._flushed = facts["now"]
            self._outbox += self._address(self._joiner.flush(facts["now"]))
        elif record.kind == "acknowledged":
            self._outbox = []
        elif record.kind == "worker":
            self._worker = facts["worker"]
        else:
            self._worker, self._sequences, self._flushed = facts["worker"], facts["sequences"], facts["flushed"]
            self._joiner.restore(facts["joiner"], arrays)

    def _address(self, delta: Delta) -> Iterator[Message]:
        shards = shard_of(delta.cluster, self._settings.shards)
        for shard in np.unique(shards).tolist():
            yield Message(shard, self._worker, self._sequences[shard], delta.filter(shards == shard))
            self._sequences[shard] += 1

    def _state(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        joiner, arrays = self._joiner.state()
        facts = {"worker": self._worker, "sequences": self._sequences, "flushed": self._flushed}
        return facts | {"joiner": joiner}, arrays


class Delivery:
    """Hands messages to the aggregators and waits for all acknowledgements."""

    def __init__(self, aggregators: Sequence[Any]) -> None:
        self._aggregators = list(aggregators)

    def __call__(self, messages: Sequence[Message], now: float) -> None:
        """See `Collector`."""
        calls = [
            self._aggregators[message.shard].apply.remote(message.worker, message.sequence, message.delta, now)
            for message in messages
        ]
        ray.get(calls)


class _Log:
    """A journal that begins with the facts that the folder belongs to, and is compacted to the owner's state."""

    def __init__(
        self,
        folder: Path,
        compact_bytes: int,
        facts: dict[str, Any],
        state: Callable[[], tuple[dict[str, Any], dict[str, NDArray[Any]]]],
    ) -> None:
        self._journal = Journal(folder)
        self._compact_bytes, self._facts, self._state = compact_bytes, facts, state
        self.is_new = False

    def recover(self) -> Iterator[Record]:
        """What was logged. Raises UserError where the folder belongs to something else."""
        records = self._journal.records()
        first = next(records, None)
        self.is_new = first is None
        if first is None:
            self.append(Record("folder", self._facts, {}))
            return
        self._check(first.facts if first.kind == "folder" else first.facts["folder"])
        if first.kind == "state":
            yield first
        yield from records

    def append(self, record: Record) -> None:
        """See `Journal.append`."""
        self._journal.append(record)

    def compact_if_large(self) -> None:
        """Write the state in the place of a log that has grown over `compact_bytes`."""
        if self._journal.size > self._compact_bytes:
            facts, arrays = self._state()
            self._journal.compact(Record("state", {**facts, "folder": self._facts}, arrays))

    def _check(self, found: dict[str, Any]) -> None:
        for key, value in self._facts.items():
            if found[key] != value:
                raise UserError(
                    f"{self._journal.folder}: was made with {key} = {found[key]!r}, not {value!r}",
                    "name another folder",
                )
