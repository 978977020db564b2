"""What is known of each edge: sums over feedback, which commute and are counted once.

Diag-LinUCB (Yi et al. 2023) adds w² to d and w r to b of every edge (c, j) for feedback r on item j with weight w of cluster c.
Sums are whole numbers of 2**-32, so that they are the same to the bit for any order, batching and split of the feedback
(ours): an increment, at most 1, is rounded by at most 2**-33, and 2**31 of them fit into an edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysys.errors import UserError, check_count
from raysys.models.retrieval.indexes.index import Ids
from raysys.serve.bandit.graph import Graph

UNIT = 2.0**32
D, B, R, N = range(4)
"""Columns of sums: of w², of w r, of r, and the number of impressions (a whole number of ones)."""

Sums = NDArray[np.int64]


@dataclass(frozen=True)
class Decay:
    """Feedback of `bucket_s` seconds is summed apart and counts gamma^age, age in buckets; after `buckets` it is forgotten.

    The sums of a bucket commute as all do, whereas multiplying one sum from time to time does not. Each bucket takes 32
    bytes an edge.
    """

    gamma: float
    bucket_s: float
    buckets: int

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise UserError(f"decay.gamma is {self.gamma}", "a number above 0 and at most 1 is expected")
        if not self.bucket_s > 0:
            raise UserError(f"decay.bucket_s is {self.bucket_s}", "seconds above 0 are expected")
        check_count("decay.buckets", self.buckets)


def buckets_of(times: NDArray[np.float64], decay: Decay | None) -> NDArray[np.int64]:
    """The bucket of each moment [n], in seconds; all are 0 without decay."""
    return np.floor_divide(times, np.inf if decay is None else decay.bucket_s).astype(np.int64)


@dataclass(frozen=True)
class Delta:
    """Feedback summed by (cluster, item, bucket), ascending: cluster, item, bucket [M] and sums [M, 4]."""

    cluster: Ids
    item: Ids
    bucket: NDArray[np.int64]
    sums: Sums

    def __len__(self) -> int:
        return len(self.cluster)

    def filter(self, mask: NDArray[np.bool_]) -> Delta:
        """Some of the rows."""
        return Delta(self.cluster[mask], self.item[mask], self.bucket[mask], self.sums[mask])


def to_sums(weight: NDArray[np.float64], reward: NDArray[np.float64], impressions: NDArray[np.int64]) -> Sums:
    """Increments [M, 4] of feedback `reward` [M] on edges with `weight` [M]; impressions: 1, or 0 where they were counted."""
    d, b, r = weight**2 * impressions, weight * reward, reward
    return np.stack([*np.rint(np.stack([d, b, r]) * UNIT).astype(np.int64), impressions], axis=1)


def sum_up(cluster: Ids, item: Ids, bucket: NDArray[np.int64], sums: Sums) -> Delta:
    """The delta of rows [M] in any order."""
    order = np.lexsort((bucket, item, cluster))
    keys = np.stack([cluster, item, bucket])[:, order]  # [3, M]
    starts = np.flatnonzero(np.diff(keys, axis=1, prepend=keys[:, :1] - 1).any(0))
    total = np.add.reduceat(sums[order], starts) if len(starts) else sums
    first = keys[:, starts]
    return Delta(first[0], first[1], first[2], total)


def merge(deltas: Sequence[Delta]) -> Delta:
    """One delta that does what all of them do, in any order."""
    columns = zip(*((delta.cluster, delta.item, delta.bucket, delta.sums) for delta in deltas), strict=True)
    return sum_up(*(np.concatenate(column) for column in columns))


@dataclass(frozen=True)
class Statistics:
    """The edges [E] of one version of a graph: d >= ridge, b, impressions n, and the sum of rewards r; float64."""

    d: NDArray[np.float64]
    b: NDArray[np.float64]
    n: NDArray[np.float64]
    r: NDArray[np.float64]

    def take(self, edges: NDArray[np.int64]) -> Statistics:
        """Those of some edges."""
        return Statistics(self.d[edges], self.b[edges], self.n[edges], self.r[edges])


class EdgeSums:
    """The sums of all edges of one shard: a function of the calls made, so that a log of them restores it to the bit.

    Two versions of the graph are kept, the one that every shard is known to have and the newest, so that a reader finds one
    that all shards have at any moment of a refresh. An edge that the newest graph has not stays for `grace_s` seconds and
    takes late feedback; when a graph has it again by then it goes on with what it has. After that it is deleted.

    deltas: how many were applied. late, discarded, expired: rows of them for edges in their grace, for edges that are not
    there, and older than `decay` remembers; the last two count nowhere.
    """

    def __init__(self, *, ridge: float = 1.0, grace_s: float = 3600.0, decay: Decay | None = None) -> None:
        if not ridge > 0:
            raise UserError(f"ridge is {ridge}", "a number above 0 is expected: d starts with it and is divided by")
        if not grace_s >= 0:
            raise UserError(f"grace_s is {grace_s}", "seconds, 0 or more, are expected")
        self.ridge, self.grace_s, self.decay = ridge, grace_s, decay
        self.graphs: list[Graph] = []
        self.deltas = self.late = self.discarded = self.expired = 0
        self._edges = EdgeIndex(*np.zeros((2, 0), np.int64))
        self._dropped = np.zeros(0)  # [M] when an edge left the newest graph, inf where it is in it
        self._buckets: dict[int, Sums] = {}  # [M, 4] of each
        self._applied: dict[str, Applied] = {}

    @property
    def versions(self) -> list[int]:
        """Of the graphs for which there are statistics, ascending."""
        return [graph.version for graph in self.graphs]

    def check_next(self, version: int, base: int | None) -> bool:
        """Whether this version is new here. Raises UserError where this shard has gone on without `base`: someone else refreshes."""
        if version in self.versions:
            return False
        if self.versions and (base not in [None, *self.versions] or version < self.versions[-1]):
            raise UserError(
                f"graph {version} was made from {base}, and this shard has {self.versions}",
                "make the next graph from the newest snapshot, in one process at a time",
            )
        return True

    def set_graph(self, graph: Graph, base: int | None, now: float) -> None:
        """Go on to the next graph; `base`, the version that it was made from, stays too.

        base: the version that every shard has, None where there is none. now: seconds. Nothing is done, or UserError raised,
        where `check_next` says so.
        """
        if not self.check_next(graph.version, base):
            return
        self.graphs = [known for known in self.graphs if known.version == base] + [graph]
        before, columns = self._edges, [(known.edge_clusters, known.items) for known in self.graphs]
        kept = self._dropped + self.grace_s > now
        columns.append((before.cluster[kept], before.item[kept]))
        cluster, item = (np.concatenate(column) for column in zip(*columns, strict=True))
        cluster, item = np.unique(np.stack([cluster, item]), axis=1)
        self._edges = EdgeIndex(cluster, item)
        place, found = before.find(cluster, item)
        _, is_newest = EdgeIndex(graph.edge_clusters, graph.items).find(cluster, item)
        dropped = np.full(len(cluster), now)
        dropped[found] = np.minimum(dropped[found], self._dropped[place[found]])
        self._dropped = np.where(is_newest, np.inf, dropped)
        for bucket, sums in self._buckets.items():
            self._buckets[bucket] = np.zeros((len(cluster), 4), np.int64)
            self._buckets[bucket][found] = sums[place[found]]

    def apply(self, worker: str, sequence: int, delta: Delta, now: float) -> bool:
        """Add a delta, unless this one of the worker was added before; whether it was added. now: seconds."""
        if not self._applied.setdefault(worker, Applied()).add(sequence):
            return False
        self.deltas += 1
        oldest = self._oldest(now)
        for bucket in [bucket for bucket in self._buckets if bucket < oldest]:
            del self._buckets[bucket]
        place, found = self._edges.find(delta.cluster, delta.item)
        in_time = delta.bucket >= oldest
        self.discarded += int((in_time & ~found).sum())
        self.expired += int((~in_time).sum())
        counted = found & in_time
        self.late += int(np.isfinite(self._dropped[place[counted]]).sum())
        for bucket in np.unique(delta.bucket[counted]).tolist():
            sums = self._buckets.setdefault(bucket, np.zeros((len(self._dropped), 4), np.int64))
            rows = counted & (delta.bucket == bucket)
            sums[place[rows]] += delta.sums[rows]  # an edge is there once a bucket
        return True

    def statistics(self, version: int, now: float) -> Statistics:
        """Of the edges of one of `versions`, in their order. now: seconds, which `decay` counts from."""
        graph = self.graphs[self.versions.index(version)]
        place, _ = self._edges.find(graph.edge_clusters, graph.items)
        total = np.zeros((len(place), 4))
        newest = self._bucket(now)
        for bucket in sorted(self._buckets):
            age = max(newest - bucket, 0)  # a clock that is ahead makes feedback no heavier
            if self.decay is None:
                total += self._buckets[bucket][place]
            elif age < self.decay.buckets:
                total += self.decay.gamma**age * self._buckets[bucket][place]
        return Statistics(self.ridge + total[:, D] / UNIT, total[:, B] / UNIT, total[:, N], total[:, R] / UNIT)

    def _bucket(self, now: float) -> int:
        return int(buckets_of(np.array(now), self.decay))

    def _oldest(self, now: float) -> int:
        """The first bucket that is not forgotten."""
        return 0 if self.decay is None else self._bucket(now) - self.decay.buckets + 1

    def state(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Everything, as plain facts and as arrays."""
        facts = {
            "graphs": [[graph.version, graph.next_cluster] for graph in self.graphs],
            "counters": [self.deltas, self.late, self.discarded, self.expired],
            "applied": {
                worker: [applied.all_below, sorted(applied.above)] for worker, applied in self._applied.items()
            },
        }
        arrays = {"cluster": self._edges.cluster, "item": self._edges.item, "dropped": self._dropped}
        for number, graph in enumerate(self.graphs):
            arrays |= {f"graph{number}.{name}": getattr(graph, name) for name in GRAPH_ARRAYS}
        return facts, arrays | {f"bucket{bucket}": sums for bucket, sums in self._buckets.items()}

    def restore(self, facts: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        """Become what `state` told of."""
        self.graphs = [
            Graph(version, next_cluster, *(arrays[f"graph{number}.{name}"] for name in GRAPH_ARRAYS))
            for number, (version, next_cluster) in enumerate(facts["graphs"])
        ]
        self.deltas, self.late, self.discarded, self.expired = facts["counters"]
        self._applied = {worker: Applied(low, set(above)) for worker, (low, above) in facts["applied"].items()}
        self._edges, self._dropped = EdgeIndex(arrays["cluster"], arrays["item"]), arrays["dropped"]
        self._buckets = {
            int(name.removeprefix("bucket")): sums for name, sums in arrays.items() if name.startswith("bucket")
        }


GRAPH_ARRAYS = ("clusters", "centroids", "offsets", "items")


@dataclass
class Applied:
    """Numbers of the deltas of one worker that were applied: all below one, and some above, where they came out of order."""

    all_below: int = 0
    above: set[int] = field(default_factory=set)

    def add(self, sequence: int) -> bool:
        """Whether it is new."""
        if sequence < self.all_below or sequence in self.above:
            return False
        self.above.add(sequence)
        while self.all_below in self.above:
            self.above.remove(self.all_below)
            self.all_below += 1
        return True


class EdgeIndex:
    """Where each pair (cluster, item) of ascending ones [M] stands: a binary search in numbers of pairs."""

    def __init__(self, cluster: Ids, item: Ids) -> None:
        self.cluster, self.item = cluster, item
        self._clusters, first = np.unique(cluster, return_inverse=True)
        self._items, second = np.unique(item, return_inverse=True)
        self._keys = first * len(self._items) + second

    def find(self, cluster: Ids, item: Ids) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The place [n] of each pair [n], any where it is not there, and whether it is."""
        if not len(self._keys):
            return np.zeros(len(cluster), np.int64), np.zeros(len(cluster), np.bool_)
        first, has_cluster = _search(self._clusters, cluster)
        second, has_item = _search(self._items, item)
        place, found = _search(self._keys, first * len(self._items) + second)
        return place, found & has_cluster & has_item


def _search(values: NDArray[np.int64], asked: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    place = np.searchsorted(values, asked).clip(max=len(values) - 1)
    return place, values[place] == asked
