"""Edge sums: the same to the bit for any order, batching and split; counted once; graphs that change; decay."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from raysys.errors import UserError
from raysys.serve.bandit.build import carry_over
from raysys.serve.bandit.edges import Decay, EdgeSums, merge, sum_up, to_sums
from raysys.serve.bandit.graph import insert_items

EVENTS = 3000


@pytest.fixture
def feedback(small, rng):
    """Feedback on random edges: edge [n], weight [n], reward [n]."""
    return rng.integers(0, len(small.graph.items), EVENTS), rng.random(EVENTS), rng.random(EVENTS)


def delta_of(graph, feedback, bucket=0):
    edge, weight, reward = feedback
    sums = to_sums(weight, reward, np.ones(len(edge), np.int64))
    return sum_up(graph.edge_clusters[edge], graph.items[edge], np.full(len(edge), bucket), sums)


def filled(graph, deltas, **settings):
    sums = EdgeSums(**settings)
    sums.set_graph(graph, None, 0.0)
    for number, delta in enumerate(deltas):
        assert sums.apply("worker", number, delta, 0.0)
    return sums


def columns(statistics):
    return np.stack([getattr(statistics, name) for name in ("d", "b", "n", "r")])


def test_sums_are_those_of_the_formula(small, feedback):
    edge, weight, reward = feedback
    found = filled(small.graph, [delta_of(small.graph, feedback)], ridge=2.0).statistics(1, 0.0)
    expected = np.zeros((4, len(small.graph.items)))
    expected[0] = 2.0
    for e, w, r in zip(edge, weight, reward, strict=True):
        expected[:, e] += [w * w, w * r, 1, r]
    most = np.bincount(edge).max()
    np.testing.assert_allclose(columns(found), expected, rtol=0, atol=(most + 1) * 2**-33)
    assert (found.n == expected[2]).all()


def test_any_order_batching_and_split_give_the_same_bits(small, feedback, rng):
    whole = columns(filled(small.graph, [delta_of(small.graph, feedback)]).statistics(1, 0.0))
    for pieces in (2, 7, 100):
        order = rng.permutation(EVENTS)
        parts = [tuple(column[rows] for column in feedback) for rows in np.array_split(order, pieces)]
        deltas = [delta_of(small.graph, part) for part in parts]
        assert (columns(filled(small.graph, deltas).statistics(1, 0.0)) == whole).all()
        assert (columns(filled(small.graph, [merge(deltas)]).statistics(1, 0.0)) == whole).all()
        sums = EdgeSums()
        sums.set_graph(small.graph, None, 0.0)
        for number in rng.permutation(pieces):  # of two workers, out of order
            assert sums.apply(f"worker {number % 2}", number // 2, deltas[number], 0.0)
        assert (columns(sums.statistics(1, 0.0)) == whole).all()


def test_a_delta_that_comes_again_changes_nothing(small, feedback, rng):
    deltas = [delta_of(small.graph, tuple(column[k::5] for column in feedback)) for k in range(5)]
    sums = filled(small.graph, deltas)
    before = columns(sums.statistics(1, 0.0))
    for number in rng.permutation(5):
        assert not sums.apply("worker", int(number), deltas[number], 0.0)
    assert (columns(sums.statistics(1, 0.0)) == before).all()
    assert sums.apply("other", 0, deltas[0], 0.0)
    assert sums.deltas == 6


def test_d_never_falls_and_the_bonus_shrinks(small, feedback):
    sums = EdgeSums()
    sums.set_graph(small.graph, None, 0.0)
    before = sums.statistics(1, 0.0).d
    assert (before == 1).all()
    for number in range(10):
        delta = delta_of(small.graph, tuple(column[number::10] for column in feedback))
        sums.apply("worker", number, delta, 0.0)
        after = sums.statistics(1, 0.0).d
        assert (after >= before).all()
        assert (1 / np.sqrt(after) <= 1 / np.sqrt(before)).all()
        assert after.sum() > before.sum()
        before = after


def test_kept_edges_go_on_new_ones_start_and_dropped_ones_wait_for_their_grace(small, feedback):
    old = small.graph
    sums = filled(old, [delta_of(old, feedback)], grace_s=100.0)
    statistics = dict(
        zip(zip(old.edge_clusters, old.items, strict=True), columns(sums.statistics(1, 0.0)).T, strict=True)
    )
    kept = np.arange(72) % 6 < 4  # each cluster keeps four of its six
    new = dataclasses.replace(old, version=2, offsets=np.arange(13) * 4, items=old.items[kept])
    new = insert_items(new, np.array([1]), old.centroids[:1], 1)
    sums.set_graph(new, 1, now=10.0)
    assert sums.versions == [1, 3]
    for edge, found in zip(
        zip(new.edge_clusters, new.items, strict=True), columns(sums.statistics(3, 10.0)).T, strict=True
    ):
        assert (found == statistics.get(edge, [1, 0, 0, 0])).all()
    assert (list(statistics.values()) == columns(sums.statistics(1, 10.0)).T).all()  # still served meanwhile
    late = delta_of(old, tuple(column[:50] for column in feedback))
    dropped = int((~np.isin(late.cluster * 1000 + late.item, new.edge_clusters * 1000 + new.items)).sum())
    sums.apply("worker", 1, late, 50.0)
    assert (sums.late, sums.discarded) == (dropped, 0)
    sums.set_graph(dataclasses.replace(new, version=4), 3, now=200.0)  # the grace is over
    sums.apply("worker", 2, late, 201.0)
    assert (sums.late, sums.discarded) == (dropped, dropped)
    sums.set_graph(dataclasses.replace(old, version=5), 4, now=202.0)
    found = columns(sums.statistics(5, 202.0)).T
    assert (found[~kept] == [1, 0, 0, 0]).all()  # deleted, and started anew
    assert (found[kept][:, 2] >= [counts[2] for counts in np.array(list(statistics.values()))[kept]]).all()


def test_an_edge_that_comes_back_within_its_grace_goes_on(small, feedback):
    old = small.graph
    sums = filled(old, [delta_of(old, feedback)], grace_s=100.0)
    before = columns(sums.statistics(1, 0.0))
    empty = dataclasses.replace(old, version=2, offsets=np.zeros(13, np.int64), items=old.items[:0])
    sums.set_graph(empty, 1, now=10.0)
    sums.set_graph(dataclasses.replace(old, version=3), 2, now=109.0)
    assert (columns(sums.statistics(3, 109.0)) == before).all()


def test_clusters_below_the_threshold_start_without_statistics(small, feedback, unit_vectors):
    old = small.graph
    sums = filled(old, [delta_of(old, feedback)])
    centroids = old.centroids.copy()
    centroids[5] = -centroids[5]
    new = carry_over(old, dataclasses.replace(old, centroids=centroids), 0.999)
    sums.set_graph(new, 1, now=1.0)
    impressions = columns(sums.statistics(2, 1.0))[2].reshape(12, 6)
    assert (impressions[-1] == 0).all()
    assert (impressions[:-1] == np.delete(columns(sums.statistics(1, 1.0))[2].reshape(12, 6), 5, 0)).all()


def test_a_graph_that_was_not_made_from_the_common_one_is_refused(small):
    sums = EdgeSums()
    for version, base in ((1, None), (3, 1), (3, 1)):
        sums.set_graph(dataclasses.replace(small.graph, version=version), base, 0.0)
    with pytest.raises(UserError, match=r"graph 4 was made from 2, and this shard has \[1, 3\]"):
        sums.set_graph(dataclasses.replace(small.graph, version=4), 2, 0.0)
    with pytest.raises(UserError, match="graph 2 was made from 1"):
        sums.set_graph(dataclasses.replace(small.graph, version=2), 1, 0.0)


def test_decay_weighs_buckets_by_age_and_commutes(small, feedback, rng):
    decay = Decay(gamma=0.5, bucket_s=10.0, buckets=4)
    parts = [tuple(column[k::5] for column in feedback) for k in range(5)]
    deltas = [delta_of(small.graph, part, bucket) for bucket, part in enumerate(parts)]
    alone = [columns(filled(small.graph, [delta_of(small.graph, part)]).statistics(1, 0.0)) for part in parts]
    ridge = np.array([1.0, 0, 0, 0])[:, None]
    expected = sum(0.5 ** (4 - k) * (alone[k] - ridge) for k in range(1, 5)) + ridge  # bucket 0 is forgotten
    found = []
    for order in (range(5), rng.permutation(5)):
        sums = EdgeSums(decay=decay)
        sums.set_graph(small.graph, None, 0.0)
        for number in order:
            sums.apply("worker", int(number), deltas[number], now=45.0)
        found.append(columns(sums.statistics(1, now=45.0)))
        assert sums.expired == len(deltas[0])
    assert (found[0] == found[1]).all()
    np.testing.assert_allclose(found[0], expected, rtol=1e-12)
    later = columns(sums.statistics(1, now=55.0))
    np.testing.assert_allclose(
        (later - ridge)[2].sum(), (0.5 * (expected - 0.125 * alone[1] * [[0], [0], [1], [0]]))[2].sum()
    )
    assert (columns(sums.statistics(1, now=1000.0)) == ridge).all()


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match="ridge is 0"):
        EdgeSums(ridge=0)
    with pytest.raises(UserError, match="grace_s is -1"):
        EdgeSums(grace_s=-1)
    with pytest.raises(UserError, match=r"decay.gamma is 1.5"):
        Decay(1.5, 1.0, 3)
    with pytest.raises(UserError, match=r"decay.buckets is 0"):
        Decay(0.5, 1.0, 0)
