from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import r2_score, roc_auc_score

from raysys.data.hashing import mix
from raysys.data.sketches import (
    HashSample,
    LabelScore,
    is_in,
    noise_of_stability_index,
    quantile_edges,
    stability_index,
)


def hashes(values):
    return mix(np.asarray(values, np.uint64))


def test_distinct_values_are_exact_up_to_the_limit_and_close_beyond():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 3000, 20_000)
    sample = HashSample(distinct=True, limit=4096)
    for part in np.array_split(values, 7):
        sample.add(hashes(part))
    assert (sample.finish().count, sample.bits) == (len(np.unique(values)), 0)
    sample = HashSample(distinct=True, limit=4096)
    for part in np.array_split(np.arange(200_000), 31):
        sample.add(hashes(part))
    assert len(sample.finish().hashes) <= 4096
    assert sample.bits > 0
    assert sample.count == pytest.approx(
        200_000, rel=4 / np.sqrt(2048)
    )  # 4 standard deviations of at least 2048 hashes


def test_unseen_values_are_exact_and_their_share_is_unbiased_when_sampled():
    small, large = HashSample(distinct=True), HashSample(distinct=True, limit=4096)
    for sample in (small, large):
        sample.add(hashes(np.arange(100_000)))
        sample.finish()
    rows = hashes(np.arange(80_000, 120_000))
    assert small.unseen(rows) == (40_000, 20_000)
    known, unseen = large.unseen(rows)
    assert 0 < known < 4000
    assert unseen / known == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(known))


def test_repeats_are_kept_unless_distinct_values_are_asked_for():
    sample = HashSample(distinct=False)
    sample.add(hashes([1, 2, 2]))
    sample.add(hashes([2, 3]))
    assert np.array_equal(sample.finish().hashes, np.sort(hashes([1, 2, 2, 2, 3])))


def test_membership():
    known = np.sort(hashes(np.arange(50)))
    assert is_in(hashes(np.arange(25, 75)), known).tolist() == [True] * 25 + [False] * 25
    assert not is_in(hashes([1]), np.empty(0, np.uint64)).any()
    assert not is_in(np.array([2**64 - 1], np.uint64), known).any()


def test_edges_cut_equal_shares_and_give_frequent_values_their_own_bucket():
    values = np.concatenate([np.zeros(900), np.arange(1, 101)])
    edges = quantile_edges(values, 11)
    counts = np.bincount(np.searchsorted(edges, values, side="right"))
    assert counts.max() == 900  # the zeros alone
    assert len(quantile_edges(np.array([np.nan, np.inf]), 10)) == 0
    assert np.array_equal(quantile_edges(np.array([1.0, np.nan, 1.0]), 10), [1.0, np.nextafter(1.0, 2.0)])


def test_psi_follows_its_definition_and_chance():
    p, q = np.array([50.0, 30, 20, 0]), np.array([20.0, 30, 50, 0])
    a, b = (p[:3] + 0.5) / 101.5, (q[:3] + 0.5) / 101.5
    assert stability_index(p, q) == pytest.approx(np.sum((a - b) * np.log(a / b)), abs=1e-15)
    assert stability_index(p, 7 * p) == pytest.approx(0, abs=1e-3)
    rng = np.random.default_rng(0)
    shares = np.full(40, 1 / 40)
    pairs = [(rng.multinomial(4000, shares) * 1.0, rng.multinomial(1000, shares) * 1.0) for _ in range(300)]
    found = np.mean([stability_index(*pair) for pair in pairs])
    assert found == pytest.approx(noise_of_stability_index(*pairs[0]), rel=0.1)  # standard error 0.23 / sqrt(300)


def test_the_auc_of_buckets_is_that_of_their_rates():
    rng = np.random.default_rng(1)
    bucket = rng.integers(0, 20, 5000)
    label = (rng.random(5000) < np.abs(bucket - 9) / 12).astype(float)  # high at both ends: not monotone
    score = LabelScore(20)
    score.add(bucket, label)
    expected = []
    for own, other in ((0, 1), (1, 0)):
        rate = [label[other::2][bucket[other::2] == b].mean() for b in range(20)]
        expected.append(roc_auc_score(label[own::2], np.asarray(rate)[bucket[own::2]]))
    assert score.auc() == pytest.approx(np.mean(expected), abs=1e-3)  # the rates are smoothed by one row


def test_a_column_of_chance_scores_one_half_however_many_buckets_it_has():
    rng = np.random.default_rng(2)
    score = LabelScore(256)
    score.add(rng.integers(0, 256, 1000), (rng.random(1000) < 0.3).astype(float))
    assert score.auc() == pytest.approx(0.5, abs=4 * 0.02)  # 4 standard deviations of an AUC of 500 rows, twice


def test_explained_variance_is_that_of_the_buckets_means():
    rng = np.random.default_rng(3)
    bucket = rng.integers(0, 8, 4000)
    label = bucket * 2.0 + rng.normal(size=4000)
    score = LabelScore(8)
    score.add(bucket, label)
    expected = []
    for own, other in ((0, 1), (1, 0)):
        mean = np.array([label[other::2][bucket[other::2] == b].mean() for b in range(8)])
        expected.append(r2_score(label[own::2], mean[bucket[own::2]]))
    assert score.explained() == pytest.approx(np.mean(expected), abs=1e-3)


def test_scores_of_one_class_are_undefined():
    score = LabelScore(4)
    score.add(np.array([0, 1, 2, 3]), np.zeros(4))
    assert np.isnan(score.auc())
    assert np.isnan(score.explained())
