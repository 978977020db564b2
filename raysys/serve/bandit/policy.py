"""Which items a user is offered: contexts, upper confidence bounds, and the choice among the best.

Diag-LinUCB (Yi et al. 2023). With w the weights of a user's K nearest clusters and the edges (c, j) of these alone:

    w_c    = exp(<u, centroid_c> / temperature) / sum over the K nearest
    mean_j = sum_c w_c b_cj / d_cj                        UCB_j = mean_j + alpha sqrt(sum_c w_c² / d_cj)

A request costs K times W edges, whatever the number of items, and is answered by a few array operations for all users at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from raysys.data.columns import ranges
from raysys.errors import UserError, check_count
from raysys.models.retrieval.indexes.index import NO_ITEM, Ids, Vectors, check_vectors
from raysys.serve.bandit.edges import Statistics
from raysys.serve.bandit.graph import NO_CLUSTER, Graph

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Policy:
    """How a request is answered.

    neighbours: K. temperature: of the softmax, τ'. alpha: of the bonus. top_n: explore mode draws evenly among so many best
    scores, since statistics are minutes old and one best item would be shown again and again until then. normalize: "edges"
    divides the mean by the number of the item's edges among the K clusters, over which it is summed up; "none" is the
    paper's. unseen_first: explore mode puts items before all others of whose edges here none has an impression (ours; their
    bonus alone need not exceed the means of others).
    """

    neighbours: int = 4
    temperature: float = 0.15
    alpha: float = 0.3
    top_n: int = 5
    normalize: Literal["none", "edges"] = "none"
    unseen_first: bool = False

    def __post_init__(self) -> None:
        check_count("neighbours", self.neighbours)
        check_count("top_n", self.top_n)
        if not self.temperature > 0:
            raise UserError(f"temperature is {self.temperature}", "a number above 0 is expected, such as 0.1 to 0.3")
        if not self.alpha >= 0:
            raise UserError(f"alpha is {self.alpha}", "0 or more is expected, such as 0.1 to 1")
        if self.normalize not in ("none", "edges"):
            raise UserError(f"normalize is {self.normalize!r}", "none or edges is expected")


@dataclass(frozen=True)
class Snapshot:
    """One version of the graph with statistics of its edges, in their order; never changed, so a request reads only one.

    version: tells snapshots apart: that of the graph, and how many deltas each shard had counted.
    """

    version: str
    graph: Graph
    statistics: Statistics

    def __post_init__(self) -> None:
        graph, statistics = self.graph, self.statistics
        for ids in (graph.clusters, graph.offsets, graph.items):
            ids.flags.writeable = False
        graph.centroids.flags.writeable = False
        for values in (statistics.d, statistics.b, statistics.n, statistics.r):
            values.flags.writeable = False

    @cached_property
    def catalogue(self) -> tuple[Ids, NDArray[np.int64]]:
        """The distinct items [I] of the graph, ascending, and which of them each edge [E] leads to."""
        return np.unique(self.graph.items, return_inverse=True)


@dataclass(frozen=True)
class Contexts:
    """cluster: [B, K] positions in the graph of the clusters with weight [B, K], which sums to 1 in a row."""

    cluster: NDArray[np.int64]
    weight: Floats


@dataclass(frozen=True)
class Candidates:
    """Pairs of user and item, G in all, ascending by user, then by item; and the edges that make them, F in all.

    user, item: [G], an item by its place in `Snapshot.catalogue`. Of each edge: `edge` [F] in the graph, `pair` [F]
    ascending, and `slot` [F], which of the user's K clusters it starts from.
    """

    user: NDArray[np.int64]
    item: NDArray[np.int64]
    edge: NDArray[np.int64]
    pair: NDArray[np.int64]
    slot: NDArray[np.int64]


@dataclass(frozen=True)
class Scores:
    """Of candidates [G]: the mean term, the UCB, and `rate`, the mean reward of impressions on the item's edges here.

    rate: sum_c w_c r_cj / sum_c w_c n_cj, a probability where rewards are clicks, which `mean` is not: that is summed over
    edges. NaN where there was no impression. unseen: no edge has one.
    """

    mean: Floats
    ucb: Floats
    rate: Floats
    unseen: NDArray[np.bool_]


@dataclass(frozen=True)
class Recommendations:
    """What B users are offered, up to k items each, best first; a row with fewer ends with `NO_ITEM`.

    item: [B, k]. score: [B, k] that they were ordered by, then `mean` and `rate` as in `Scores`. propensity: [B, k], the
    probability with which the item was among the k. cluster: [B, k, K] ids of the clusters whose edge to the item took part,
    else `NO_CLUSTER`; weight: [B, k, K], their w, to be logged with the impression. graph, version: of the snapshot.
    """

    item: Ids
    score: Floats
    mean: Floats
    rate: Floats
    propensity: Floats
    cluster: Ids
    weight: Floats
    graph: int
    version: str


def contexts(users: Vectors, graph: Graph, policy: Policy) -> Contexts:
    """The K nearest clusters of user vectors [B, D], in no order, and their weights."""
    users = check_vectors("users", users, graph.centroids.shape[1])
    if policy.neighbours > len(graph.clusters):
        raise UserError(
            f"neighbours is {policy.neighbours} and there are {len(graph.clusters)} clusters",
            "ask for fewer neighbours",
        )
    cosines = users @ graph.centroids.T  # [B, C]
    cluster = np.argpartition(-cosines, policy.neighbours - 1, axis=1)[:, : policy.neighbours]
    nearest = np.take_along_axis(cosines, cluster, 1).astype(np.float64) / policy.temperature
    weight = np.exp(nearest - nearest.max(1, keepdims=True))
    return Contexts(cluster, weight / weight.sum(1, keepdims=True))


def candidates(context: Contexts, snapshot: Snapshot) -> Candidates:
    """The union of the edges of each user's clusters."""
    users, neighbours = context.cluster.shape
    first, last = snapshot.graph.offsets[:-1], snapshot.graph.offsets[1:]
    sizes = (last - first)[context.cluster].ravel()  # [B K]
    edge = ranges(first[context.cluster].ravel(), sizes)
    place = np.repeat(np.arange(users * neighbours), sizes)
    items, item_of = snapshot.catalogue
    key = place // neighbours * len(items) + item_of[edge]
    order = np.argsort(key, kind="stable")
    key = key[order]
    is_first = np.diff(key, prepend=-1) > 0
    pair = np.cumsum(is_first) - 1
    user, item = np.divmod(key[is_first], max(len(items), 1))
    return Candidates(user, item, edge[order], pair, place[order] % neighbours)


def score(context: Contexts, found: Candidates, statistics: Statistics, policy: Policy) -> Scores:
    """Means, bounds and rates of candidates."""
    edges, pairs = statistics.take(found.edge), len(found.user)
    weight = context.weight[found.user[found.pair], found.slot]  # [F]

    def total(values: Floats) -> Floats:
        return np.bincount(found.pair, values, pairs).astype(np.float64, copy=False)  # it is int64 where there are none

    mean = total(weight * edges.b / edges.d)
    if policy.normalize == "edges":
        mean /= np.bincount(found.pair, minlength=pairs)
    bonus = policy.alpha * np.sqrt(total(weight**2 / edges.d))
    impressions = total(weight * edges.n)
    rate = np.divide(total(weight * edges.r), impressions, out=np.full(pairs, np.nan), where=impressions > 0)
    return Scores(mean, mean + bonus, rate, impressions == 0)


def recommend(
    snapshot: Snapshot,
    users: Vectors,
    policy: Policy,
    *,
    count: int = 1,
    explore: bool = True,
    exclude: Ids | None = None,
    generator: np.random.Generator,
) -> Recommendations:
    """Up to `count` items for each user vector [B, D], of length 1.

    explore: a draw without replacement among the max(top_n, count) highest UCB; otherwise the highest means, whatever top_n.
    exclude: [n] items that none of them is offered.
    """
    check_count("count", count)
    context = contexts(users, snapshot.graph, policy)
    found = candidates(context, snapshot)
    if exclude is not None:
        found = _filtered(found, ~np.isin(snapshot.catalogue[0], exclude)[found.item])
    scores = score(context, found, snapshot.statistics, policy)
    order_by = scores.mean
    if explore:
        order_by = np.where(scores.unseen, np.inf, scores.ucb) if policy.unseen_first else scores.ucb
    pool = max(policy.top_n, count) if explore else count
    pairs, propensity = _choose(found.user, order_by, len(users), pool, count, generator if explore else None)
    is_there = pairs >= 0  # [B, k]
    cluster, weight = _edges_of(pairs, context, found, snapshot.graph)

    item = np.full(pairs.shape, NO_ITEM, np.int64)
    item[is_there] = snapshot.catalogue[0][found.item[pairs[is_there]]]

    def of(values: Floats) -> Floats:
        spread_out = np.full(pairs.shape, np.nan)
        spread_out[is_there] = values[pairs[is_there]]
        return spread_out

    columns = (of(order_by), of(scores.mean), of(scores.rate), propensity, cluster, weight)
    return Recommendations(item, *columns, snapshot.graph.version, snapshot.version)


def edges_of_items(snapshot: Snapshot, users: Vectors, items: Ids, policy: Policy) -> tuple[Ids, Floats]:
    """`cluster` and `weight` [B, k, K], as in `Recommendations`, of items [B, k] that something else chose for users [B, D]."""
    context = contexts(users, snapshot.graph, policy)
    found = candidates(context, snapshot)
    catalogue, _ = snapshot.catalogue
    pairs = np.full(items.shape, -1, np.int64)
    if len(found.user):
        place = np.searchsorted(catalogue, items).clip(max=len(catalogue) - 1)
        wanted = np.arange(len(users))[:, None] * len(catalogue) + place
        there = found.user * len(catalogue) + found.item  # ascending
        pair = np.searchsorted(there, wanted).clip(max=len(there) - 1)
        is_there = (catalogue[place] == items) & (there[pair] == wanted)
        pairs[is_there] = pair[is_there]
    return _edges_of(pairs, context, found, snapshot.graph)


def _filtered(found: Candidates, kept: NDArray[np.bool_]) -> Candidates:
    """Some of the candidates; kept: [G]."""
    edges = kept[found.pair]
    pair = (np.cumsum(kept) - 1)[found.pair[edges]]
    return Candidates(found.user[kept], found.item[kept], found.edge[edges], pair, found.slot[edges])


def _choose(
    user: NDArray[np.int64],
    by: Floats,
    users: int,
    pool: int,
    count: int,
    generator: np.random.Generator | None,
) -> tuple[NDArray[np.int64], Floats]:
    """Which pairs [B, k] each user gets, best first, -1 for none, and with which probability [B, k], 0 for none.

    Drawn from the `pool` best of a user, ties in random order; without a generator the best.
    """
    tie = np.zeros(len(user)) if generator is None else generator.random(len(user))
    order = np.lexsort((tie, -by, user))
    size = np.bincount(user, minlength=users)
    rank = np.arange(len(user)) - np.repeat(np.cumsum(size) - size, size)  # of each in `order` among its user's
    best, size = order[rank < pool], np.minimum(size, pool)
    if generator is not None:  # a random order of the pool, of which the first `count` are taken, best first again
        draw = np.lexsort((generator.random(len(best)), user[best]))
        rank = np.arange(len(best)) - np.repeat(np.cumsum(size) - size, size)
        best = best[np.sort(draw[rank < count])]
    taken = np.minimum(size, count)
    column = np.arange(len(best)) - np.repeat(np.cumsum(taken) - taken, taken)
    pairs, propensity = np.full((users, count), -1, np.int64), np.zeros((users, count))
    pairs[user[best], column] = best
    propensity[user[best], column] = (taken / np.maximum(size, 1))[user[best]]
    return pairs, propensity


def _edges_of(pairs: NDArray[np.int64], context: Contexts, found: Candidates, graph: Graph) -> tuple[Ids, Floats]:
    """The clusters [B, k, K], by id, with an edge to the chosen items, and their weights; `NO_CLUSTER` and 0 for the others."""
    neighbours = context.cluster.shape[1]
    has_edge = np.zeros((len(found.user) + 1, neighbours), np.bool_)  # a last row for -1
    has_edge[found.pair, found.slot] = True
    active = has_edge[pairs]  # [B, k, K]
    cluster = np.where(active, graph.clusters[context.cluster][:, None, :], NO_CLUSTER)
    return cluster, np.where(active, context.weight[:, None, :], 0.0)
