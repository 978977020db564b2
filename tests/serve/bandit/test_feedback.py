"""The join of impressions with rewards: once, with the logged weights, whatever comes first, late or twice."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from raysys.errors import UserError
from raysys.serve.bandit.edges import UNIT, Decay, Statistics, merge
from raysys.serve.bandit.feedback import Impressions, Joiner, check_rewards, concatenate, to_impressions
from raysys.serve.bandit.policy import Policy, Snapshot, recommend


def impressions(ids, time, clusters=((4, 9, -1),), weights=((0.5, 0.25, 0.0),), item=7):
    size = len(ids)
    return Impressions(
        id=np.array(ids, np.int64),
        time=np.full(size, float(time)),
        item=np.full(size, item),
        cluster=np.tile(np.array(clusters), (size, 1)),
        weight=np.tile(np.array(weights), (size, 1)),
        graph=np.ones(size, np.int64),
        propensity=np.ones(size),
        position=np.zeros(size, np.int64),
    )


def as_dict(delta):
    keys = zip(delta.cluster.tolist(), delta.item.tolist(), delta.bucket.tolist(), strict=True)
    return {key: (sums / [UNIT, UNIT, UNIT, 1]).tolist() for key, sums in zip(keys, delta.sums, strict=True)}


def reward(joiner, ids, values, now):
    joiner.reward(np.array(ids, np.int64), np.array(values, float), float(now))


def test_feedback_counts_with_the_logged_weights_alone():
    """0.5² and 0.5 for cluster 4, 0.25² and 0.25 for cluster 9, whatever the graph says meanwhile."""
    joiner = Joiner()
    joiner.impress(impressions([1], 0))
    reward(joiner, [1], [0.5], 1)
    assert as_dict(joiner.flush(1.0)) == {(4, 7, 0): [0.25, 0.25, 0.5, 1], (9, 7, 0): [0.0625, 0.125, 0.5, 1]}
    assert len(joiner.flush(2.0)) == 0


def test_what_recommend_gave_is_what_is_counted(small, rng):
    size = len(small.graph.items)
    snapshot = Snapshot("1", small.graph, Statistics(np.ones(size), *np.zeros((3, size))))
    shown = recommend(snapshot, small.users[:50], Policy(), count=3, generator=rng)
    joiner = Joiner()
    joiner.impress(to_impressions(shown, np.arange(150).reshape(50, 3), 5.0).check())
    reward(joiner, np.arange(0, 150, 3), np.ones(50), 6)
    found = as_dict(joiner.flush(6.0))
    expected = {}
    for row, place, slot in np.ndindex(*shown.cluster.shape):
        if shown.cluster[row, place, slot] >= 0:
            w, r = shown.weight[row, place, slot], float(place == 0)
            key = (shown.cluster[row, place, slot], shown.item[row, place], 0)
            expected[key] = expected.get(key, 0) + np.array([w * w, w * r, r, 1])
    assert found.keys() == expected.keys()
    for key, sums in expected.items():
        np.testing.assert_allclose(found[key], sums, atol=1e-8)  # 50 roundings of 2**-33
    edges = set(zip(small.graph.edge_clusters.tolist(), small.graph.items.tolist(), strict=True))
    assert {key[:2] for key in found} <= edges


def test_an_impression_waits_for_the_horizon_before_it_counts_as_a_failure():
    joiner = Joiner(horizon_s=60.0)
    joiner.impress(impressions([1, 2], 0))
    assert len(joiner.flush(59.0)) == 0
    reward(joiner, [2], [1.0], 59.5)
    assert as_dict(joiner.flush(59.9))[4, 7, 0] == [0.25, 0.5, 1, 1]  # a reward counts at once
    assert as_dict(joiner.flush(60.0))[4, 7, 0] == [0.25, 0, 0, 1]  # impression 1 alone
    reward(joiner, [1], [1.0], 61)
    assert as_dict(joiner.flush(61.0))[4, 7, 0] == [0, 0.5, 1, 0]  # what it lacked


@pytest.mark.parametrize("horizon_s", [0.0, 20.0, 1000.0])
def test_the_sums_in_the_end_are_the_same_for_every_horizon_and_order(horizon_s, rng):
    shown = [impressions([number], time=number, item=number % 3) for number in range(100)]
    rewards = [(number, rng.random(), number + 200 * rng.random()) for number in rng.permutation(100)[:40]]
    joiner, deltas = Joiner(horizon_s=horizon_s, join_s=1000.0), []
    events = [(number, None) for number in range(100)] + [(time, (number, value)) for number, value, time in rewards]
    for time, event in sorted(events, key=lambda event: event[0]):
        if event is None:
            joiner.impress(shown[int(time)])
        else:
            reward(joiner, [event[0]], [event[1]], time)
        deltas.append(joiner.flush(time))
    deltas.append(joiner.flush(1100.0))
    found = as_dict(merge([delta for delta in deltas if len(delta)]))
    expected = {}
    clicked = {number: value for number, value, _ in rewards}
    for number in range(100):
        for cluster, w in ((4, 0.5), (9, 0.25)):
            r = clicked.get(number, 0.0)
            key = (cluster, number % 3, 0)
            expected[key] = expected.get(key, 0) + np.array([w * w, w * r, r, 1])
    for key, sums in expected.items():
        np.testing.assert_allclose(found[key], sums, atol=1e-8)
    assert len(joiner) == 0


def test_what_comes_twice_counts_once():
    joiner = Joiner()
    for _ in range(2):
        joiner.impress(impressions([1, 2], 0))
        reward(joiner, [1, 1], [1.0, 0.5], 1)
    assert as_dict(joiner.flush(1.0))[4, 7, 0] == [0.5, 0.5, 1, 2]
    assert joiner.duplicates == 2 + 3
    joiner.impress(impressions([1], 0))
    reward(joiner, [1], [1.0], 2)
    assert len(joiner.flush(2.0)) == 0
    assert joiner.duplicates == 7


def test_a_reward_waits_for_its_impression_and_is_counted_as_unmatched_in_the_end():
    joiner = Joiner(join_s=100.0)
    reward(joiner, [1, 5], [1.0, 1.0], 0)
    assert len(joiner.flush(1.0)) == 0
    joiner.impress(impressions([1], 0))
    assert as_dict(joiner.flush(2.0))[4, 7, 0] == [0.25, 0.5, 1, 1]
    joiner.flush(100.0)
    assert (joiner.unmatched, len(joiner)) == (1, 0)
    reward(joiner, [1], [1.0], 101)  # too late
    assert len(joiner.flush(102.0)) == 0


def test_a_bucket_is_that_of_the_impression():
    joiner = Joiner(decay=Decay(0.5, 10.0, 5))
    joiner.impress(concatenate([impressions([1], 25), impressions([2], 31)]))
    reward(joiner, [1, 2], [1.0, 1.0], 39)
    assert {key[2] for key in as_dict(joiner.flush(40.0))} == {2, 3}


def test_policies_of_other_k_are_held_together():
    joiner = Joiner()
    joiner.impress(impressions([1], 0))
    joiner.impress(impressions([2], 0, clusters=((4,),), weights=((1.0,),)))
    assert as_dict(joiner.flush(0.0)) == {(4, 7, 0): [1.25, 0, 0, 2], (9, 7, 0): [0.0625, 0, 0, 1]}


def test_a_state_restores_everything(rng):
    one, other = Joiner(horizon_s=50.0), Joiner(horizon_s=50.0)
    one.impress(impressions(range(20), 0))
    reward(one, [3, 4, 99], [1, 1, 1], 1)
    one.flush(2.0)
    one.impress(impressions(range(20, 30), 3))
    reward(one, [5, 20], [1, 1], 4)
    other.restore(*one.state())
    for now in (5.0, 60.0):
        assert as_dict(one.flush(now)) == as_dict(other.flush(now))
    assert (one.duplicates, one.unmatched, len(one)) == (other.duplicates, other.unmatched, len(other))


def test_what_is_wrong_is_named():
    with pytest.raises(UserError, match=r"reward 1.5 of impression 4"):
        check_rewards([3, 4], [1.0, 1.5])
    with pytest.raises(UserError, match="reward nan"):
        check_rewards([3], [np.nan])
    with pytest.raises(UserError, match="horizon_s is 10 and join_s 5"):
        Joiner(horizon_s=10, join_s=5)
    good = impressions([1], 0)
    with pytest.raises(UserError, match="a weight is below 0 or above 1"):
        dataclasses.replace(good, weight=good.weight * 3).check()
    with pytest.raises(UserError, match="time holds NaN"):
        dataclasses.replace(good, time=good.time * np.nan).check()
    with pytest.raises(UserError, match="different lengths"):
        dataclasses.replace(good, item=np.zeros(2, np.int64)).check()
