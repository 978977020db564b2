"""95% intervals of metrics, and of the difference of two models on the same rows, in pure NumPy.

Each metric is linearised: a row's influence is how much the metric would change, to first order, with more of that row. The
variance of the metric is the sum of squared influences (for AUC: DeLong et al. 1988), and that of a difference the sum of
squared differences, so that what two models share cancels. Cost: O(n log n), and the same answer each time, where a bootstrap
takes hundreds of passes and agrees. Rows count as independent: with many rows per user the true interval is wider.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from raysys.train.ranking_metrics import Floats, entropy, row_log_loss

Z_95 = 1.959963984540054
"""Half the width of a 95% interval in standard errors."""


class Interval(NamedTuple):
    """A value and its 95% interval; NaN where the metric is undefined."""

    value: float
    low: float
    high: float


class Linearised(NamedTuple):
    """A metric's value and each row's influence on it [n]; influences sum to 0."""

    value: float
    influence: Floats


Linearise = Callable[[Floats, Floats, Floats], Linearised]


def log_loss_influence(label: Floats, probability: Floats, weight: Floats) -> Linearised:
    """Influences on the log-loss (nats)."""
    total = weight.sum()
    losses = row_log_loss(label, probability)
    value = float(weight @ losses / total)
    return Linearised(value, weight * (losses - value) / total * _small_sample(weight))


def ne_influence(label: Floats, probability: Floats, weight: Floats) -> Linearised:
    """Influences on normalised entropy; the base rate moves with the rows, too."""
    total = weight.sum()
    rate = float(weight @ label / total)
    if not 0 < rate < 1:
        return _undefined(label)
    losses, norm = row_log_loss(label, probability), entropy(rate)
    value = float(weight @ losses / total) / norm
    slope = np.log((1 - rate) / rate)  # dH/dm
    influence = weight * (losses - value * norm - value * slope * (label - rate)) / (norm * total)
    return Linearised(value, influence * _small_sample(weight))


def auc_influence(label: Floats, score: Floats, weight: Floats) -> Linearised:
    """Influences on AUC: how much of the other class each row outranks, ties half (DeLong's structural components)."""
    positive, negative = weight * label, weight * (1 - label)
    positives, negatives = positive.sum(), negative.sum()
    if positives <= 0 or negatives <= 0:
        return _undefined(label)
    order = np.argsort(score, kind="stable")
    ties = np.flatnonzero(np.concatenate([[True], score[order][1:] != score[order][:-1]]))
    run = np.empty(len(score), np.int64)
    run[order] = np.repeat(np.arange(len(ties)), np.diff(np.append(ties, len(score))))
    tied_positive, tied_negative = (np.add.reduceat(mass[order], ties) for mass in (positive, negative))
    negative_below = np.cumsum(tied_negative) - tied_negative / 2
    positive_above = positives - np.cumsum(tied_positive) + tied_positive / 2
    value = float(tied_positive @ negative_below / (positives * negatives))
    influence = positive * (negative_below[run] / negatives - value) / positives * _small_sample(positive)
    influence += negative * (positive_above[run] / positives - value) / negatives * _small_sample(negative)
    return Linearised(value, influence)


LINEARISED: dict[str, Linearise] = {"ne": ne_influence, "auc": auc_influence, "log_loss": log_loss_influence}
"""The metrics that have intervals, by their key in an evaluation."""


def metric_interval(metric: str, label: ArrayLike, probability: ArrayLike, weight: ArrayLike | None = None) -> Interval:
    """The 95% interval of one metric (a key of LINEARISED) of one model."""
    y, p, w = _rows(label, probability, weight)
    return _interval(LINEARISED[metric](y, p, w)) if len(y) else _interval(_undefined(y))


def ne_interval(label: ArrayLike, probability: ArrayLike, weight: ArrayLike | None = None) -> Interval:
    """Normalised entropy with its 95% interval."""
    return metric_interval("ne", label, probability, weight)


def auc_interval(label: ArrayLike, score: ArrayLike, weight: ArrayLike | None = None) -> Interval:
    """AUC with its 95% interval (DeLong)."""
    return metric_interval("auc", label, score, weight)


def paired_interval(
    labels: ArrayLike, weights: ArrayLike | None, p_a: ArrayLike, p_b: ArrayLike, metric: str
) -> Interval:
    """metric(p_b) - metric(p_a) with its 95% interval, for two models' predictions of the same rows in the same order.

    It is narrower than the two models' own intervals suggest, because both see the same rows. An interval that leaves 0 out
    is a difference that the noise of these rows does not explain (the noise of training seeds is another matter).
    """
    y, first, w = _rows(labels, p_a, weights)
    _, second, _ = _rows(labels, p_b, weights)
    if not len(y):
        return _interval(_undefined(y))
    one, two = LINEARISED[metric](y, first, w), LINEARISED[metric](y, second, w)
    return _interval(Linearised(two.value - one.value, two.influence - one.influence))


def _rows(label: ArrayLike, prediction: ArrayLike, weight: ArrayLike | None) -> tuple[Floats, Floats, Floats]:
    y, p = np.asarray(label, np.float64), np.asarray(prediction, np.float64)
    w = np.ones(len(y)) if weight is None else np.asarray(weight, np.float64)
    return y[w > 0], p[w > 0], w[w > 0]


def _small_sample(weight: Floats) -> float:
    count = np.count_nonzero(weight)
    return float(np.sqrt(count / (count - 1))) if count > 1 else float("nan")


def _undefined(label: Floats) -> Linearised:
    return Linearised(float("nan"), np.full(len(label), np.nan))


def _interval(metric: Linearised) -> Interval:
    half = Z_95 * float(np.sqrt(np.sum(metric.influence**2)))
    return Interval(metric.value, metric.value - half, metric.value + half)
