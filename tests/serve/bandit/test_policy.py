"""Contexts, bounds and choices against plain NumPy; equality with LinUCB where theory has it; the cost of a request."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from raysys.errors import UserError
from raysys.models.retrieval.indexes.exact import Exact
from raysys.models.retrieval.indexes.index import NO_ITEM
from raysys.serve.bandit.build import build_graph
from raysys.serve.bandit.edges import Statistics
from raysys.serve.bandit.graph import NO_CLUSTER, Graph
from raysys.serve.bandit.policy import (
    Contexts,
    Policy,
    Snapshot,
    candidates,
    contexts,
    edges_of_items,
    recommend,
    score,
)


@pytest.fixture
def snapshot(small, rng):
    """Statistics as after some feedback; a third of the edges has none."""
    edges = len(small.graph.items)
    n = rng.integers(1, 200, edges) * (rng.random(edges) > 0.3)
    d, rate = 1 + 0.2 * n, rng.random(edges)
    return Snapshot("1:5", small.graph, Statistics(d, 0.3 * n * rate, n.astype(float), n * rate))


def dense(snapshot, users, policy):
    """Means, bounds and rates [B, J] by the formulas, -inf where an item is no candidate; w [B, C] and edges [C, J]."""
    graph, (clusters, items) = snapshot.graph, (len(snapshot.graph.clusters), int(snapshot.graph.items.max()) + 1)
    rows = np.repeat(np.arange(clusters), np.diff(graph.offsets))
    tables = np.zeros((4, clusters, items))
    tables[:, rows, graph.items] = [getattr(snapshot.statistics, name) for name in ("d", "b", "n", "r")]
    is_edge = tables[0] > 0
    cosines = users.astype(np.float64) @ graph.centroids.T.astype(np.float64)
    w = np.zeros_like(cosines)
    for row, values in enumerate(cosines):
        best = np.argsort(-values)[: policy.neighbours]
        w[row, best] = np.exp(values[best] / policy.temperature) / np.exp(values[best] / policy.temperature).sum()
    d = np.where(is_edge, tables[0], 1)
    mean = w @ np.where(is_edge, tables[1] / d, 0)
    active = (w > 0).astype(float) @ is_edge
    if policy.normalize == "edges":
        mean = mean / np.maximum(active, 1)
    ucb = mean + policy.alpha * np.sqrt(w**2 @ np.where(is_edge, 1 / d, 0))
    with np.errstate(invalid="ignore"):
        rate = (w @ tables[3]) / (w @ tables[2])
    there = active > 0
    return np.where(there, mean, -np.inf), np.where(there, ucb, -np.inf), rate, w, is_edge


@pytest.mark.parametrize("normalize", ["none", "edges"])
@pytest.mark.parametrize("neighbours", [1, 4])
def test_bounds_are_those_of_a_dense_reference(snapshot, small, normalize, neighbours):
    policy = Policy(neighbours=neighbours, alpha=0.7, normalize=normalize)
    users = small.users[:40]
    context = contexts(users, snapshot.graph, policy)
    found = candidates(context, snapshot)
    scores = score(context, found, snapshot.statistics, policy)
    mean, ucb, rate, w, _ = dense(snapshot, users, policy)
    item = snapshot.catalogue[0][found.item]
    assert len(item) == (mean > -np.inf).sum()
    np.testing.assert_allclose(
        np.sort(context.weight, 1), np.sort(w, 1)[:, -neighbours:], atol=1e-5
    )  # cosines are float32
    np.testing.assert_allclose(scores.mean, mean[found.user, item], rtol=1e-5)
    np.testing.assert_allclose(scores.ucb, ucb[found.user, item], rtol=1e-5)
    np.testing.assert_allclose(scores.rate, rate[found.user, item], rtol=1e-5)
    assert (scores.unseen == np.isnan(scores.rate)).all()


def test_exploring_draws_evenly_among_the_best_and_exploiting_takes_the_best_mean(snapshot, small):
    policy = Policy(neighbours=3, top_n=4)
    users = np.repeat(small.users[:1], 4000, 0)
    mean, ucb, *_ = dense(snapshot, users[:1], policy)
    best = set(np.argsort(-ucb[0])[:4].tolist())
    rng = np.random.default_rng(0)
    shown = recommend(snapshot, users, policy, count=2, generator=rng)
    assert (shown.propensity == 0.5).all()
    values, counts = np.unique(shown.item, return_counts=True)
    assert set(values.tolist()) == best
    assert (abs(counts - 2000) < 5 * np.sqrt(4000 * 0.25)).all()  # five deviations of a binomial
    assert (np.diff(shown.score, axis=1) <= 0).all()
    exploited = recommend(snapshot, users[:3], policy, count=6, explore=False, generator=rng)
    np.testing.assert_array_equal(exploited.item, np.tile(np.argsort(-mean[0], kind="stable")[:6], (3, 1)))
    assert (exploited.propensity == 1).all()
    np.testing.assert_array_equal(exploited.score, exploited.mean)


def test_candidates_are_those_of_the_nearest_clusters_alone(snapshot, small, rng):
    policy = Policy(neighbours=2, top_n=3)
    shown = recommend(snapshot, small.users, policy, count=20, generator=rng)
    _, _, _, w, is_edge = dense(snapshot, small.users, policy)
    for row, items in enumerate(shown.item):
        allowed = set(np.flatnonzero(is_edge[w[row] > 0].any(0)).tolist())
        found = items[items >= 0].tolist()
        assert len(found) == len(set(found)) == min(20, len(allowed))
        assert set(found) <= allowed
        assert (items[len(found) :] == -1).all()


def test_the_logged_weights_are_those_of_edges_that_took_part(snapshot, small, rng):
    policy = Policy(neighbours=4)
    shown = recommend(snapshot, small.users[:30], policy, count=3, generator=rng)
    _, _, _, w, is_edge = dense(snapshot, small.users[:30], policy)
    for row, place in np.ndindex(30, 3):
        logged = dict(zip(shown.cluster[row, place].tolist(), shown.weight[row, place].tolist(), strict=True))
        expected = np.flatnonzero((w[row] > 0) & is_edge[:, shown.item[row, place]])
        assert set(logged) - {-1} == set(expected.tolist())
        np.testing.assert_allclose([logged[cluster] for cluster in expected.tolist()], w[row, expected], atol=1e-5)
    assert (shown.weight[shown.cluster == -1] == 0).all()


def test_unseen_items_come_first_where_that_is_asked_for(small, rng):
    graph, items = small.graph, small.graph.items
    n = np.where(items == items[0], 0.0, 50.0)
    snapshot = Snapshot("1", graph, Statistics(1 + n, 0.9 * n, n, 0.9 * n))
    users = graph.centroids[:1]  # item 0 of the first cluster is a candidate there
    policy = Policy(neighbours=1, top_n=1)
    assert recommend(snapshot, users, policy, generator=rng).item[0, 0] != items[0]
    fresh = dataclasses.replace(policy, unseen_first=True)
    assert recommend(snapshot, users, fresh, generator=rng).item[0, 0] == items[0]
    assert recommend(snapshot, users, fresh, explore=False, generator=rng).item[0, 0] != items[0]


def linucb(contexts_of, rewards, w, alpha):
    """Mean and bound of one item by Li et al. 2010 after (context, reward) pairs, ridge 1."""
    a, b = np.eye(len(w)), np.zeros(len(w))
    for x, r in zip(contexts_of, rewards, strict=True):
        a, b = a + np.outer(x, x), b + x * r
    inverse = np.linalg.inv(a)
    return w @ inverse @ b, w @ inverse @ b + alpha * np.sqrt(w @ inverse @ w)


def diagonal(contexts_of, rewards, w, alpha):
    """The same by the code: one item with an edge from each cluster."""
    size = len(w)
    graph = Graph(
        1, size, np.arange(size), np.eye(size, dtype=np.float32), np.arange(size + 1), np.zeros(size, np.int64)
    )
    d, b = 1 + (contexts_of**2).sum(0), contexts_of.T @ rewards
    snapshot = Snapshot("1", graph, Statistics(d, b, np.ones(size), np.ones(size)))
    active = np.flatnonzero(w)
    context = Contexts(active[None], w[None, active])
    scores = score(context, candidates(context, snapshot), snapshot.statistics, Policy(len(active), alpha=alpha))
    return scores.mean[0], scores.ucb[0]


def test_one_active_cluster_is_linucb_and_ucb_on_the_ridge_mean(rng):
    size, events = 5, 300
    used = np.eye(size)[rng.integers(0, size, events)]
    rewards = rng.integers(0, 2, events).astype(float)
    for w in np.eye(size):
        found, expected = diagonal(used, rewards, w, 0.3), linucb(used, rewards, w, 0.3)
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        n, total = used[:, w > 0].sum(), rewards[used[:, w > 0][:, 0] > 0].sum()
        np.testing.assert_allclose(found, (total / (1 + n), total / (1 + n) + 0.3 / np.sqrt(1 + n)), rtol=1e-12)


def test_orthogonal_contexts_are_full_linucb(rng):
    size, events = 6, 400
    used = np.eye(size)[rng.integers(0, size, events)] * rng.random((events, 1))  # the others' weight is 0
    rewards = rng.random(events)
    w = rng.dirichlet(np.ones(size))
    np.testing.assert_allclose(diagonal(used, rewards, w, 0.3), linucb(used, rewards, w, 0.3), rtol=1e-10)


def test_correlated_contexts_differ_and_by_how_much(rng, record_figure):
    """Summed over edges, the diagonal's mean is too large; the file of figures has the ratio."""
    size, events = 4, 2000
    used = rng.dirichlet(np.full(size, 2.0), events)
    rewards = (rng.random(events) < 0.3).astype(float)
    w = rng.dirichlet(np.full(size, 2.0))
    (found, _), (expected, _) = diagonal(used, rewards, w, 0.3), linucb(used, rewards, w, 0.3)
    record_figure("mean of Diag-LinUCB over LinUCB", found / expected)
    assert abs(expected - 0.3) < 0.06
    assert 1.5 < found / expected < size  # 4 where all weights are equal
    same = np.full((events, size), 1 / size)
    assert diagonal(same, rewards, same[0], 0.3)[0] == pytest.approx(size * rewards.mean(), rel=0.04)


@pytest.mark.parametrize("items", [10**4, 10**5, 10**6])
def test_a_request_costs_the_same_for_any_catalogue(items, unit_vectors):
    """Edges that are read, and the arrays that hold them: K W a user."""
    rng = np.random.default_rng(0)
    users, index = unit_vectors(rng, 500), Exact(8)
    index.add(np.arange(items), unit_vectors(rng, items))
    graph = build_graph(users, index, clusters=16, width=25)
    size = len(graph.items)
    snapshot = Snapshot("1", graph, Statistics(np.ones(size), *np.zeros((3, size))))
    context = contexts(users, graph, Policy(neighbours=4))
    found = candidates(context, snapshot)
    assert len(found.edge) == len(users) * 4 * 25
    assert len(found.item) <= len(found.edge)
    assert len(snapshot.catalogue[0]) <= 16 * 25


def test_a_snapshot_cannot_be_changed(snapshot):
    for array in (snapshot.statistics.d, snapshot.statistics.b, snapshot.graph.items, snapshot.graph.centroids):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_no_users_and_no_edges_give_empty_answers(small, rng):
    graph = dataclasses.replace(small.graph, offsets=np.zeros(13, np.int64), items=small.graph.items[:0])
    snapshot = Snapshot("1", graph, Statistics(*np.zeros((4, 0))))
    shown = recommend(snapshot, small.users[:3], Policy(), count=2, generator=rng)
    assert (shown.item == -1).all()
    assert (shown.propensity == 0).all()
    assert recommend(snapshot, small.users[:0], Policy(), count=2, generator=rng).item.shape == (0, 2)


def test_what_is_wrong_is_named(snapshot, small, rng):
    with pytest.raises(UserError, match="neighbours is 13 and there are 12 clusters"):
        contexts(small.users, small.graph, Policy(neighbours=13))
    with pytest.raises(UserError, match=r"users have shape \[2, 3\]"):
        recommend(snapshot, np.ones((2, 3), np.float32), Policy(), generator=rng)
    for key, value in {"neighbours": 0, "temperature": 0, "alpha": -1, "top_n": 0, "normalize": "sum"}.items():
        with pytest.raises(UserError, match=f"{key} is"):
            Policy(**{key: value})


def test_what_is_excluded_is_never_offered_and_the_others_keep_their_scores(snapshot, small):
    policy = Policy(neighbours=3, top_n=1)
    generator = np.random.default_rng(0)
    everything = recommend(snapshot, small.users, policy, count=30, explore=False, generator=generator)
    exclude = np.unique(everything.item[:, 0])[:5]
    found = recommend(snapshot, small.users, policy, count=30, explore=False, exclude=exclude, generator=generator)
    assert not np.isin(found.item, exclude).any()
    for user in range(len(small.users)):
        kept = ~np.isin(everything.item[user], [*exclude, NO_ITEM])
        there = found.item[user] != NO_ITEM
        np.testing.assert_array_equal(found.item[user][there], everything.item[user][kept])
        np.testing.assert_array_equal(found.score[user][there], everything.score[user][kept])
        np.testing.assert_array_equal(found.weight[user][there], everything.weight[user][kept])


def test_the_edges_of_items_that_another_chose_are_those_of_its_own_offers(snapshot, small):
    policy = Policy(neighbours=3)
    shown = recommend(snapshot, small.users, policy, count=40, explore=False, generator=np.random.default_rng(0))
    cluster, weight = edges_of_items(snapshot, small.users, shown.item, policy)
    there = shown.item != NO_ITEM
    np.testing.assert_array_equal(np.sort(cluster[there]), np.sort(shown.cluster[there]))
    np.testing.assert_allclose(weight[there].sum(1), shown.weight[there].sum(1))
    stranger = np.full((len(small.users), 1), 10_000)  # no item of the graph
    cluster, weight = edges_of_items(snapshot, small.users, stranger, policy)
    assert (cluster == NO_CLUSTER).all()
    assert (weight == 0).all()
