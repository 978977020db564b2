"""A world in which Diag-LinUCB and simpler policies choose among the same candidates, and their regret is known.

The world is ours: theta_cj = clip(0.15 + N(0, 0.12) + N_j(0, 0.10), 0, 1), a graph of the W largest theta + N(0, 0.25) of each
cluster, users that are a centroid plus N(0, 1/D) in each column, and Bernoulli rewards of <w_u, theta_j> with the weights of all K clusters of the user.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from raysys.models.retrieval.indexes.index import Ids, Vectors
from raysys.serve.bandit.edges import Decay, EdgeSums, Statistics
from raysys.serve.bandit.feedback import Joiner, to_impressions
from raysys.serve.bandit.graph import Graph
from raysys.serve.bandit.policy import (
    Candidates,
    Contexts,
    Floats,
    Policy,
    Snapshot,
    candidates,
    contexts,
    recommend,
)


@dataclass(frozen=True)
class World:
    """theta: [C, J] mean rewards of item j in cluster c. graph: version 1, whose items are 0 to J - 1."""

    theta: Floats
    graph: Graph

    @classmethod
    def draw(cls, seed: int, clusters: int = 60, items: int = 300, width: int = 20, dim: int = 16) -> World:
        """A world of its own for each seed."""
        rng = np.random.default_rng([seed, 0])
        theta = 0.15 + rng.normal(0, 0.12, (clusters, items)) + rng.normal(0, 0.10, items)
        theta = theta.clip(0, 1)
        guess = theta + rng.normal(0, 0.25, theta.shape)
        edges = np.sort(np.argpartition(-guess, width - 1, axis=1)[:, :width], axis=1)  # [C, W]
        offsets = np.arange(clusters + 1) * width
        return cls(theta, Graph(1, clusters, np.arange(clusters), _unit(rng, clusters, dim), offsets, edges.ravel()))

    def users(self, seed: int, rounds: int) -> Vectors:
        """User vectors [rounds, D], around centroids that are drawn evenly."""
        rng = np.random.default_rng([seed, 1])
        centroids = self.graph.centroids[rng.integers(0, len(self.graph.clusters), rounds)]
        users = centroids + rng.normal(0, 1 / np.sqrt(centroids.shape[1]), centroids.shape)
        return (users / np.linalg.norm(users, axis=1, keepdims=True)).astype(np.float32)

    def values(self, context: Contexts) -> Floats:
        """The mean reward [B, J] of every item for users."""
        return np.einsum("bk,bkj->bj", context.weight, self.theta[context.cluster])


class Chooser(Protocol):
    """A policy in the simulation: it chooses for a window of users, then sees their rewards."""

    def choose(self, users: Vectors, context: Contexts, found: Candidates) -> Ids:
        """An item for each user [B], one of the user's candidates, which have `item` by its id here."""

    def learn(self, context: Contexts, items: Ids, rewards: Floats) -> None:
        """The rewards [B] of what was chosen."""


@dataclass
class Outcome:
    """regret: [rounds] of each choice to the best item of all. items: [rounds] that were chosen."""

    regret: Floats
    items: Ids
    rewards: Floats

    @property
    def quarters(self) -> list[float]:
        """Cumulative regret of each quarter."""
        return [float(part.sum()) for part in np.array_split(self.regret, 4)]


def simulate(
    world: World,
    chooser: Chooser,
    policy: Policy,
    seed: int,
    rounds: int = 20_000,
    window: int = 100,
    change: Callable[[int], World | None] = lambda start: None,
) -> Outcome:
    """Rounds in windows of `window` users, after each of which the chooser learns. Users and luck are those of the seed.

    policy: its neighbours and temperature make the contexts. change: the world from the round `start` of a window on, where it
    becomes another one.
    """
    users, luck = world.users(seed, rounds), np.random.default_rng([seed, 2]).random(rounds)
    graph = Snapshot("", world.graph, _nothing(len(world.graph.items)))
    regret, chosen, rewards = np.zeros(rounds), np.zeros(rounds, np.int64), np.zeros(rounds)
    for start in range(0, rounds, window):
        world = change(start) or world
        rows = slice(start, min(start + window, rounds))
        context = contexts(users[rows], world.graph, policy)
        found = candidates(context, graph)
        found = replace(found, item=graph.catalogue[0][found.item])
        chosen[rows] = chooser.choose(users[rows], context, found)
        values = world.values(context)
        value = np.take_along_axis(values, chosen[rows, None], 1)[:, 0]
        rewards[rows] = luck[rows] < value
        regret[rows] = values.max(1) - value
        chooser.learn(context, chosen[rows], rewards[rows])
    return Outcome(regret, chosen, rewards)


@dataclass
class DiagLinUCB:
    """What is served: snapshots, `recommend`, impressions that are joined, and sums. A window lasts a second."""

    graph: Graph
    policy: Policy
    seed: int
    decay: Decay | None = None
    explore: bool = True
    now: float = 0.0
    sums: EdgeSums = field(init=False)

    def __post_init__(self) -> None:
        self.sums, self._joiner = EdgeSums(decay=self.decay), Joiner(decay=self.decay)
        self.sums.set_graph(self.graph, None, 0.0)
        self._rng = np.random.default_rng([self.seed, 3])

    def snapshot(self) -> Snapshot:
        """Of now."""
        version = self.sums.versions[-1]
        return Snapshot(str(version), self.sums.graphs[-1], self.sums.statistics(version, self.now))

    def choose(self, users: Vectors, context: Contexts, found: Candidates) -> Ids:
        """See `Chooser.choose`."""
        shown = recommend(self.snapshot(), users, self.policy, explore=self.explore, generator=self._rng)
        self._ids = self._rng.integers(0, 2**63, len(users))
        self._joiner.impress(to_impressions(shown, self._ids[:, None], self.now))
        return shown.item[:, 0]

    def learn(self, context: Contexts, items: Ids, rewards: Floats) -> None:
        """See `Chooser.learn`."""
        self._joiner.reward(self._ids, rewards, self.now)
        self.sums.apply("simulation", self.sums.deltas, self._joiner.flush(self.now), self.now)
        self.now += 1


def _nothing(edges: int) -> Statistics:
    return Statistics(np.ones(edges), *np.zeros((3, edges)))


def _unit(rng: np.random.Generator, rows: int, dim: int) -> Vectors:
    vectors = rng.normal(size=(rows, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
