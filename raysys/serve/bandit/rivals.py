"""What Diag-LinUCB is compared with in the simulation: policies that choose among the same candidates."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysys.models.retrieval.indexes.index import Ids, Vectors
from raysys.serve.bandit.policy import Candidates, Contexts, Floats
from raysys.serve.bandit.simulation import World


class Random:
    """Any candidate."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng([seed, 3])

    def choose(self, users: Vectors, context: Contexts, found: Candidates) -> Ids:
        """See `Chooser.choose`."""
        return _best(found, np.zeros(len(found.user)), self._rng)

    def learn(self, context: Contexts, items: Ids, rewards: Floats) -> None:
        """Nothing."""


class BestCandidate:
    """The candidate that is best in truth: what the graph costs, whatever is learned."""

    def __init__(self, world: World) -> None:
        self._world, self._rng = world, np.random.default_rng(0)

    def choose(self, users: Vectors, context: Contexts, found: Candidates) -> Ids:
        """See `Chooser.choose`."""
        return _best(found, self._world.values(context)[found.user, found.item], self._rng)

    def learn(self, context: Contexts, items: Ids, rewards: Floats) -> None:
        """Nothing."""


class EpsilonGreedyItems:
    """The candidate of the largest mean reward so far, whoever the user; with probability epsilon any."""

    def __init__(self, items: int, seed: int, epsilon: float = 0.1) -> None:
        self._sums = np.zeros((items, 2))  # impressions, rewards
        self._epsilon, self._rng = epsilon, np.random.default_rng([seed, 3])

    def choose(self, users: Vectors, context: Contexts, found: Candidates) -> Ids:
        """See `Chooser.choose`."""
        means = self._sums[:, 1] / np.maximum(self._sums[:, 0], 1)
        return _epsilon_greedy(found, means[found.item], len(users), self._epsilon, self._rng)

    def learn(self, context: Contexts, items: Ids, rewards: Floats) -> None:
        """See `Chooser.learn`."""
        np.add.at(self._sums, items, np.stack([np.ones(len(items)), rewards], axis=1))


class EpsilonGreedyEdges:
    """The candidate of the largest sum_c w_c r_cj / n_cj, the mean reward of each edge; with probability epsilon any.

    An edge without impressions has mean 0.
    """

    def __init__(self, world: World, seed: int, epsilon: float = 0.1) -> None:
        clusters, items = world.theta.shape
        self._sums = np.zeros((clusters, items, 2))
        self._is_edge = np.zeros((clusters, items), np.bool_)
        self._is_edge[world.graph.edge_clusters, world.graph.items] = True
        self._epsilon, self._rng = epsilon, np.random.default_rng([seed, 3])

    def choose(self, users: Vectors, context: Contexts, found: Candidates) -> Ids:
        """See `Chooser.choose`."""
        row, item = found.user[found.pair], found.item[found.pair]
        sums = self._sums[context.cluster[row, found.slot], item]  # [F, 2]
        terms = context.weight[row, found.slot] * sums[:, 1] / sums[:, 0].clip(1)
        means = np.bincount(found.pair, terms)
        return _epsilon_greedy(found, means, len(users), self._epsilon, self._rng)

    def learn(self, context: Contexts, items: Ids, rewards: Floats) -> None:
        """See `Chooser.learn`."""
        row, slot = np.nonzero(self._is_edge[context.cluster, items[:, None]])
        np.add.at(self._sums, (context.cluster[row, slot], items[row]), np.stack([np.ones(len(row)), rewards[row]], 1))


class LinUCB:
    """Li et al. (WWW 2010), algorithm 1, with a ridge of 1: a matrix A_j over the clusters that have an edge to item j.

    An item's clusters are numbered from 0 to M - 1, M of the item with most; A_j is the identity where it has fewer.
    """

    def __init__(self, world: World, seed: int, alpha: float = 0.3) -> None:
        cluster, item = world.graph.edge_clusters, world.graph.items
        order = np.argsort(item, kind="stable")
        size = np.bincount(item, minlength=world.theta.shape[1])
        self._number = np.full(world.theta.shape, -1)  # [C, J]
        first = np.repeat(np.cumsum(size) - size, size)
        self._number[cluster[order], item[order]] = np.arange(len(order)) - first
        self._a = np.tile(np.eye(size.max()), (len(size), 1, 1))  # [J, M, M]
        self._b = np.zeros((len(size), size.max()))
        self._alpha, self._rng = alpha, np.random.default_rng([seed, 3])

    def choose(self, users: Vectors, context: Contexts, found: Candidates) -> Ids:
        """See `Chooser.choose`."""
        mean, width = self.estimate(context, found)
        return _best(found, mean + self._alpha * width, self._rng)

    def estimate(self, context: Contexts, found: Candidates) -> tuple[Floats, Floats]:
        """<w, A^-1 b> and sqrt(w A^-1 w) of pairs [G]."""
        inverse = np.linalg.inv(self._a)
        row, item = found.user[found.pair], found.item[found.pair]
        w = np.zeros((len(found.user), self._b.shape[1]))  # [G, M]
        w[found.pair, self._number[context.cluster[row, found.slot], item]] = context.weight[row, found.slot]
        theta = np.einsum("jmn,jn->jm", inverse, self._b)
        mean = np.einsum("gm,gm->g", w, theta[found.item])
        variance = np.einsum("gm,gmn,gn->g", w, inverse[found.item], w, optimize=True)
        return mean, np.sqrt(variance)

    def learn(self, context: Contexts, items: Ids, rewards: Floats) -> None:
        """See `Chooser.learn`."""
        number = self._number[context.cluster, items[:, None]]  # [B, K]
        row, slot = np.nonzero(number >= 0)
        w = np.zeros((len(items), self._b.shape[1]))
        w[row, number[row, slot]] = context.weight[row, slot]
        np.add.at(self._a, items, w[:, :, None] * w[:, None, :])
        np.add.at(self._b, items, w * rewards[:, None])


def _best(found: Candidates, by: Floats, rng: np.random.Generator) -> Ids:
    """The candidate of the largest value for each user, one of them at random where several are."""
    order = np.lexsort((rng.random(len(by)), by, found.user))
    last = np.append(np.flatnonzero(np.diff(found.user)), len(by) - 1)  # ascending by user: the last of each
    return found.item[order[last]]


def _epsilon_greedy(
    found: Candidates, means: NDArray[Any], users: int, epsilon: float, rng: np.random.Generator
) -> Ids:
    greedy, random = _best(found, means, rng), _best(found, np.zeros(len(means)), rng)
    return np.where(rng.random(users) < epsilon, random, greedy)
