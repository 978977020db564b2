from __future__ import annotations

import math

import numpy as np
import pytest

from raysys.train.intervals import LINEARISED, auc_interval, metric_interval, ne_interval, paired_interval
from raysys.train.ranking_metrics import auc, log_loss, normalized_entropy

METRICS = {"ne": normalized_entropy, "auc": auc, "log_loss": log_loss}
N = 600


def draw(rng: np.random.Generator, n: int = N) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Labels, two related predictions and weights."""
    truth = rng.beta(2, 5, n)
    noise = [np.clip(truth + 0.1 * rng.normal(size=n), 0.02, 0.98).round(2) for _ in range(2)]
    return (rng.random(n) < truth).astype(float), noise[0], 0.5 * (noise[0] + noise[1]), rng.random(n) + 0.5


def half_width(interval) -> float:
    return (interval.high - interval.low) / 2


@pytest.mark.parametrize("metric", LINEARISED)
def test_the_value_is_the_metric_and_influences_are_its_derivative(metric):
    label, a, _, weight = draw(np.random.default_rng(0), 50)
    result = LINEARISED[metric](label, a, weight)
    assert result.value == pytest.approx(METRICS[metric](label, a, weight), abs=1e-12)
    assert result.influence.sum() == pytest.approx(0, abs=1e-12)
    correction = {"auc": None}.get(metric, math.sqrt(50 / 49))
    for row in range(0, 50, 7):
        more, less = weight.copy(), weight.copy()
        more[row], less[row] = 1.001 * weight[row], 0.999 * weight[row]
        slope = (METRICS[metric](label, a, more) - METRICS[metric](label, a, less)) / 0.002
        count = (label == label[row]).sum()
        factor = correction or math.sqrt(count / (count - 1))
        assert result.influence[row] == pytest.approx(slope * factor, rel=1e-4, abs=1e-7)


def test_auc_has_the_standard_error_of_delong():
    label, a, _, _ = draw(np.random.default_rng(1), 80)
    positive, negative = a[label == 1], a[label == 0]
    wins = np.sign(positive[:, None] - negative[None, :]) / 2 + 0.5
    variance = wins.mean(1).var(ddof=1) / len(positive) + wins.mean(0).var(ddof=1) / len(negative)
    assert half_width(auc_interval(label, a)) == pytest.approx(1.959964 * math.sqrt(variance), rel=1e-6)


@pytest.mark.parametrize("metric", LINEARISED)
def test_intervals_agree_with_a_bootstrap(metric):
    rng = np.random.default_rng(2)
    label, a, b, weight = draw(rng)
    copies = rng.multinomial(N, np.full(N, 1 / N), size=400) * weight
    values = np.array([[METRICS[metric](label, p, w) for p in (a, b)] for w in copies])
    # the standard error of 400 bootstrap draws is itself known to 1 / sqrt(2 · 400) = 3.5%
    found = half_width(metric_interval(metric, label, a, weight))
    assert found == pytest.approx(1.96 * values[:, 0].std(ddof=1), rel=0.15)
    found = half_width(paired_interval(label, weight, a, b, metric))
    assert found == pytest.approx(1.96 * (values[:, 1] - values[:, 0]).std(ddof=1), rel=0.15)


@pytest.mark.parametrize("metric", LINEARISED)
def test_95_of_100_intervals_hold_the_difference(metric):
    rng = np.random.default_rng(3)
    label, a, b, _ = draw(rng, 400_000)
    truth = METRICS[metric](label, b) - METRICS[metric](label, a)
    parts = zip(*(np.split(values, 400) for values in (label, a, b)), strict=True)
    intervals = [paired_interval(y, None, p_a, p_b, metric) for y, p_a, p_b in parts]
    covered = sum(interval.low <= truth <= interval.high for interval in intervals)
    assert covered == pytest.approx(380, abs=4 * math.sqrt(400 * 0.95 * 0.05))


def test_a_pair_is_told_apart_where_two_intervals_overlap():
    label, a, b, _ = draw(np.random.default_rng(4), 3000)
    difference = paired_interval(label, None, a, b, "ne")
    assert difference.value == pytest.approx(normalized_entropy(label, b) - normalized_entropy(label, a))
    assert difference.high < 0
    assert ne_interval(label, b).high > ne_interval(label, a).low
    assert paired_interval(label, None, a, a, "auc") == (0, 0, 0)


@pytest.mark.parametrize("label", [np.empty(0), np.ones(5)])
def test_undefined_metrics_have_undefined_intervals(label):
    probability = np.linspace(0.1, 0.9, len(label))
    for interval in (ne_interval(label, probability), paired_interval(label, None, probability, probability, "auc")):
        assert all(math.isnan(value) for value in interval)


def test_rows_of_weight_zero_do_not_count():
    label, a, b, weight = draw(np.random.default_rng(5))
    weight[::3] = 0
    kept = weight > 0
    expected = paired_interval(label[kept], weight[kept], a[kept], b[kept], "auc")
    assert paired_interval(label, weight, a, b, "auc") == pytest.approx(expected, abs=1e-12)
