"""Metrics of ranking and regression tasks as pure NumPy functions, in double precision.

Notation: label y in {0, 1}, probability p, weight w >= 0 (None: all 1), base rate m = Σ w y / Σ w. A metric that is undefined
(no rows, one class only, a prediction that is NaN) is NaN, never 0 or 0.5. All are invariant to scaling the weights, and a
row of weight 2 counts like two rows. The definitions differ from torchrec.metrics where that one is wrong for evaluation:
its AUC gives ties no half credit, its log-loss is in bits, and it reports 0 or 0.5 where nothing is defined.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

EPSILON = 1e-12
"""Probabilities are clamped to [EPSILON, 1 - EPSILON] before a logarithm, as torchrec.metrics does."""

NUM_BINS = 20
"""Bins of equal mass of the calibration curve and of the expected calibration error."""


def row_log_loss(label: ArrayLike, probability: ArrayLike) -> Floats:
    """-y ln p - (1 - y) ln(1 - p) of each row, in nats."""
    y, p = _floats(label), np.clip(_floats(probability), EPSILON, 1 - EPSILON)
    return -y * np.log(p) - (1 - y) * np.log1p(-p)


def entropy(rate: float) -> float:
    """H(m) in nats: the log-loss of predicting the base rate m for every row."""
    return float(row_log_loss([rate], [rate])[0]) if 0 < rate < 1 else 0.0


def log_loss(label: ArrayLike, probability: ArrayLike, weight: ArrayLike | None = None) -> float:
    """Weighted mean log-loss in nats (torchrec.metrics reports bits: nats = bits · ln 2)."""
    losses = row_log_loss(label, probability)
    return _mean(losses, _weights(losses, weight))


def normalized_entropy(label: ArrayLike, probability: ArrayLike, weight: ArrayLike | None = None) -> float:
    """Log-loss over H(base rate of these rows): 1 for the best constant, less is better (He et al. 2014).

    Values compare only between models on the same rows, because H moves with the base rate.
    """
    y = _floats(label)
    return _ratio(log_loss(y, probability, weight), entropy(_mean(y, _weights(y, weight))))


def calibration(label: ArrayLike, probability: ArrayLike, weight: ArrayLike | None = None) -> float:
    """Σ w p / Σ w y, predicted over observed: above 1 is over-prediction. NaN without positives."""
    y, p = _floats(label), _floats(probability)
    w = _weights(y, weight)
    return _ratio(float(w @ p), float(w @ y))


class GroupAuc(NamedTuple):
    """AUC of each group and the groups' weight sums, in the order of the sorted group ids: arrays [G]."""

    auc: Floats
    mass: Floats


def group_auc(
    label: ArrayLike, score: ArrayLike, weight: ArrayLike | None = None, group: ArrayLike | None = None
) -> GroupAuc:
    """Exact weighted AUC of each group, ties counted half; NaN for a group with one class. `group` None: one group.

    AUC = Σ over positives i and negatives j of w_i w_j (1[s_i > s_j] + ½ 1[s_i = s_j]) / (P N). One sort, O(n log n), and
    no loop over groups. Rows of weight 0 are as good as absent: a group of nothing else does not appear.
    """
    y, s = _floats(label), _floats(score)
    w = _weights(y, weight)
    g = np.zeros(len(y), np.int64) if group is None else np.asarray(group)
    keep = w > 0
    y, s, w, g = y[keep], s[keep], w[keep], g[keep]
    if len(y) == 0:
        return GroupAuc(np.empty(0), np.empty(0))
    order = np.argsort(s) if group is None else np.lexsort((s, g))
    y, s, w, g = y[order], s[order], w[order], g[order]
    new_group = np.concatenate([[True], g[1:] != g[:-1]])
    ties = np.flatnonzero(new_group | np.concatenate([[True], s[1:] != s[:-1]]))  # where a run of equal scores starts
    first = np.flatnonzero(new_group)
    groups = np.searchsorted(ties, first)  # where a group starts among the runs
    positive, negative = np.add.reduceat(w * y, ties), np.add.reduceat(w * (1 - y), ties)
    below = np.cumsum(negative) - negative  # negatives with a smaller score, and all of earlier groups
    runs = np.diff(np.append(groups, len(ties)))
    below -= np.repeat(below[groups], runs)
    pairs = np.add.reduceat(positive * (below + 0.5 * negative), groups)
    positives, negatives = np.add.reduceat(positive, groups), np.add.reduceat(negative, groups)
    possible = positives * negatives
    auc = np.divide(pairs, possible, out=np.full(len(groups), np.nan), where=possible > 0)
    auc[np.isnan(s[np.append(first[1:], len(s)) - 1])] = np.nan  # NaN sorts to the end of its group
    return GroupAuc(auc, positives + negatives)


def auc(label: ArrayLike, score: ArrayLike, weight: ArrayLike | None = None) -> float:
    """Area under the ROC curve of all rows together, exact, weighted, ties counted half."""
    result = group_auc(label, score, weight).auc
    return float(result[0]) if len(result) else float("nan")


def gauc(label: ArrayLike, score: ArrayLike, group: ArrayLike, weight: ArrayLike | None = None) -> float:
    """Mean of the groups' AUCs weighted by the groups' impressions, over the groups that have both classes.

    This is the industry's GAUC (Zhu et al. 2017). torchrec's `gauc` and `grouped_auc` are plain means with other rules for
    groups of one class or one score. With weights a group's impressions are their sum.
    """
    result = group_auc(label, score, weight, group)
    if np.isnan(_floats(score)).any():
        return float("nan")
    defined = ~np.isnan(result.auc)
    return _mean(result.auc[defined], result.mass[defined])


class CalibrationBins(NamedTuple):
    """Mean prediction, mean label and weight sum of each bin that has rows, by ascending prediction: arrays [bins]."""

    prediction: Floats
    label: Floats
    weight: Floats


def calibration_bins(
    label: ArrayLike, probability: ArrayLike, weight: ArrayLike | None = None, bins: int = NUM_BINS
) -> CalibrationBins:
    """Rows cut into bins of equal weight by their prediction. Equal predictions share a bin, whatever the order of the rows."""
    y, p = _floats(label), _floats(probability)
    w = _weights(y, weight)
    order = np.argsort(p, kind="stable")
    order = order[w[order] > 0]
    y, p, w = y[order], p[order], w[order]
    if len(y) == 0:
        return CalibrationBins(np.empty(0), np.empty(0), np.empty(0))
    ties = np.flatnonzero(np.concatenate([[True], p[1:] != p[:-1]]))
    mass = np.add.reduceat(w, ties)
    middle = np.cumsum(mass) - mass / 2
    bin_of = np.minimum((bins * middle / mass.sum()).astype(np.int64), bins - 1)
    predicted, observed, total = (
        np.bincount(bin_of, np.add.reduceat(values, ties), bins).astype(np.float64) for values in (w * p, w * y, w)
    )
    used = total > 0
    return CalibrationBins(predicted[used] / total[used], observed[used] / total[used], total[used])


def expected_calibration_error(
    label: ArrayLike, probability: ArrayLike, weight: ArrayLike | None = None, bins: int = NUM_BINS
) -> float:
    """Mean over bins of equal weight of |mean prediction - mean label|, weighted by the bins' weight."""
    table = calibration_bins(label, probability, weight, bins)
    return _mean(np.abs(table.prediction - table.label), table.weight)


def rmse(label: ArrayLike, prediction: ArrayLike, weight: ArrayLike | None = None) -> float:
    """Root of the weighted mean squared error, in units of the label."""
    errors = _floats(prediction) - _floats(label)
    return float(np.sqrt(_mean(errors**2, _weights(errors, weight))))


def mae(label: ArrayLike, prediction: ArrayLike, weight: ArrayLike | None = None) -> float:
    """Weighted mean absolute error, in units of the label."""
    errors = np.abs(_floats(prediction) - _floats(label))
    return _mean(errors, _weights(errors, weight))


def binary_metrics(
    label: ArrayLike, probability: ArrayLike, weight: ArrayLike | None = None, group: ArrayLike | None = None
) -> dict[str, float]:
    """All metrics of a binary task: ne, auc, gauc (NaN without `group`), log_loss, calibration, ece, base_rate, rows.

    `rows` counts the rows of positive weight.
    """
    y = _floats(label)
    w = _weights(y, weight)
    return {
        "ne": normalized_entropy(y, probability, w),
        "auc": auc(y, probability, w),
        "gauc": float("nan") if group is None else gauc(y, probability, group, w),
        "log_loss": log_loss(y, probability, w),
        "calibration": calibration(y, probability, w),
        "ece": expected_calibration_error(y, probability, w),
        "base_rate": _mean(y, w),
        "rows": int(np.count_nonzero(w)),
    }


def regression_metrics(label: ArrayLike, prediction: ArrayLike, weight: ArrayLike | None = None) -> dict[str, float]:
    """All metrics of a regression task: rmse, mae, rows."""
    y = _floats(label)
    w = _weights(y, weight)
    return {"rmse": rmse(y, prediction, w), "mae": mae(y, prediction, w), "rows": int(np.count_nonzero(w))}


def _floats(values: ArrayLike) -> Floats:
    return np.asarray(values, dtype=np.float64)


def _weights(values: NDArray[Any], weight: ArrayLike | None) -> Floats:
    return np.ones(len(values)) if weight is None else _floats(weight)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else float("nan")


def _mean(values: Floats, weight: Floats) -> float:
    return _ratio(float(weight @ values), float(weight.sum()))
