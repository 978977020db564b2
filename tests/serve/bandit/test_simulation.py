"""The simulated world: regret bounds, a new item, rewards that change. Few rounds here; the full size is an experiment."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from raysys.serve.bandit.edges import Decay
from raysys.serve.bandit.graph import insert_items
from raysys.serve.bandit.policy import Policy, contexts
from raysys.serve.bandit.rivals import BestCandidate, EpsilonGreedyEdges, EpsilonGreedyItems, LinUCB, Random
from raysys.serve.bandit.simulation import DiagLinUCB, World, simulate

POLICY = Policy(neighbours=4, temperature=0.15, alpha=0.3, top_n=1)
SEEDS = (0, 1, 2)


def regrets(rounds, seeds):
    """Means over the seeds, by policy, and the quarters of Diag-LinUCB."""
    found: dict[str, list[float]] = {}
    quarters = []
    for seed in seeds:
        world = World.draw(seed)
        diag = DiagLinUCB(world.graph, POLICY, seed)
        runs = {
            "diag": diag,
            "random": Random(seed),
            "edges": EpsilonGreedyEdges(world, seed),
            "items": EpsilonGreedyItems(300, seed),
            "linucb": LinUCB(world, seed),
            "best": BestCandidate(world),
        }
        for name, chooser in runs.items():
            outcome = simulate(world, chooser, POLICY, seed, rounds)
            found.setdefault(name, []).append(outcome.regret.sum())
            if name == "diag":
                quarters.append(outcome.quarters)
    return {name: float(np.mean(values)) for name, values in found.items()}, np.mean(quarters, axis=0)


def check_bounds(found, quarters):
    assert found["diag"] < 0.9 * min(found["edges"], found["items"])
    assert found["diag"] < 0.5 * found["random"]
    assert found["diag"] <= 1.2 * found["linucb"]
    assert found["best"] < 0.25 * found["diag"]
    assert quarters[0] > quarters[1] > quarters[3]


def test_regret_is_below_that_of_simpler_policies():
    check_bounds(*regrets(5000, SEEDS))


@pytest.mark.experiment
def test_regret_is_below_that_of_simpler_policies_in_full(record_figure):
    found, quarters = regrets(20_000, range(5))
    for name, value in found.items():
        record_figure(f"regret {name}", value)
    check_bounds(found, quarters)


@pytest.mark.parametrize("seed", SEEDS)
def test_an_exploring_window_feeds_an_exploiting_one(seed):
    """Statistics that exploration has learned are worth as much without the bonus."""
    world = World.draw(seed)
    learner = DiagLinUCB(world.graph, POLICY, seed)
    simulate(world, learner, POLICY, seed, 4000)
    explored = simulate(world, learner, POLICY, seed + 100, 1000).regret.sum()
    learner.explore = False
    exploited = simulate(world, learner, POLICY, seed + 100, 1000).regret.sum()
    assert exploited < 1.15 * explored


@pytest.mark.parametrize("seed", SEEDS)
def test_a_new_item_is_shown_within_two_windows(seed):
    """Inserted at round 3000, when the means of others exceed the bonus of a new one: `unseen_first` shows it."""
    world = World.draw(seed)
    theta = np.concatenate([world.theta, np.full((60, 1), 0.3)], axis=1)
    rng = np.random.default_rng(seed)
    vector = world.graph.centroids[rng.integers(0, 60, 1)]
    learner = DiagLinUCB(world.graph, dataclasses.replace(POLICY, unseen_first=True), seed)
    graph = insert_items(world.graph, np.array([300]), vector, 4)
    later = World(theta, graph)

    def change(start):
        if start == 3000:
            learner.sums.set_graph(graph, 1, learner.now)
        return later if start >= 3000 else None

    outcome = simulate(world, learner, POLICY, seed, 3200, change=change)
    assert (outcome.items[3000:] == 300).sum() > 0
    edges = learner.snapshot().statistics.n[graph.items == 300]
    assert edges.sum() > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_decay_follows_rewards_that_change(seed):
    """At round 4000 every item gets the rewards of another. What decays has less regret from then on."""
    world = World.draw(seed)
    other = World(world.theta[:, np.random.default_rng(seed).permutation(300)], world.graph)
    late = {}
    for name, decay in {"none": None, "decay": Decay(gamma=0.7, bucket_s=5.0, buckets=12)}.items():
        learner = DiagLinUCB(world.graph, POLICY, seed, decay=decay)
        outcome = simulate(world, learner, POLICY, seed, 8000, change=lambda start: other if start >= 4000 else None)
        late[name] = outcome.regret[5000:].sum()
    assert late["decay"] < 0.95 * late["none"]


def test_worlds_are_those_of_their_seed():
    one, same, other = World.draw(3), World.draw(3), World.draw(4)
    np.testing.assert_array_equal(one.theta, same.theta)
    assert (one.theta != other.theta).any()
    users = one.users(3, 50)
    np.testing.assert_array_equal(users, same.users(3, 50))
    context = contexts(users, one.graph, POLICY)
    value = one.values(context)
    expected = [
        sum(w * one.theta[c, 7] for c, w in zip(row, weights, strict=True))
        for row, weights in zip(context.cluster, context.weight, strict=True)
    ]
    np.testing.assert_allclose(value[:, 7], expected, rtol=1e-12)
    assert np.diff(one.graph.offsets).tolist() == [20] * 60
