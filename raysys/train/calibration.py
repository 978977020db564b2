"""Fitting a calibration map on predictions of the validation split, with scikit-learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from raysys.errors import UserError
from raysys.nn.calibration import EPSILON, Calibrator, Isotonic, Platt

Method = Literal["platt", "isotonic"]


def fit_calibrator(
    method: Method, task: str, label: ArrayLike, probability: ArrayLike, weight: ArrayLike | None = None
) -> Calibrator:
    """Fit the map of one binary task from probabilities that are already corrected for down-sampling.

    `platt` has two parameters and keeps the order of predictions; `isotonic` follows any monotone distortion, wants some
    thousand positives, and makes ties (AUC can move). Rows of weight 0 are left out; `task` is for the error message.
    """
    y, p = np.asarray(label, np.float64), np.asarray(probability, np.float64)
    w = np.ones(len(y)) if weight is None else np.asarray(weight, np.float64)
    y, p, w = y[w > 0], p[w > 0], w[w > 0]
    if len(np.unique(y)) < 2:
        raise UserError(
            f"calibration of task {task!r}: the {len(y)} labelled rows of the validation split hold fewer than two classes",
            "evaluate on more rows, or set train.calibration to none",
        )
    return _FITS[method](y, p, w * (len(w) / w.sum()))  # a mean weight of 1: the scale of weights must not matter


def _fit_platt(y: np.ndarray, p: np.ndarray, w: np.ndarray) -> Platt:
    from sklearn.linear_model import LogisticRegression

    p = np.clip(p, EPSILON, 1 - EPSILON)
    low, high = _smoothed_targets(y, w)
    target = np.where(y > 0, high, low)
    # A soft target is a row of each class with a share of the weight: so the fit stays finite on separable data (Platt 1999).
    logit = np.tile(np.log(p) - np.log1p(-p), 2)[:, None]
    share = np.concatenate([w * target, w * (1 - target)])
    model = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-10)
    model.fit(logit, np.repeat([1, 0], len(y)), sample_weight=share)
    return Platt(slope=float(model.coef_[0, 0]), intercept=float(model.intercept_[0]))


def _fit_isotonic(y: np.ndarray, p: np.ndarray, w: np.ndarray) -> Isotonic:
    from sklearn.isotonic import IsotonicRegression

    low, high = _smoothed_targets(y, w)  # outputs of 0 or 1 would cost an infinite log-loss where they err
    model = IsotonicRegression(y_min=low, y_max=high, out_of_bounds="clip").fit(p, y, sample_weight=w)
    return Isotonic(tuple(model.X_thresholds_.tolist()), tuple(model.y_thresholds_.tolist()))


def _smoothed_targets(y: np.ndarray, w: np.ndarray) -> tuple[float, float]:
    """Platt's 1 / (N + 2) and (P + 1) / (P + 2), with the classes' weight sums."""
    positives, negatives = float(w @ y), float(w @ (1 - y))
    return 1 / (negatives + 2), (positives + 1) / (positives + 2)


_FITS: dict[Method, Callable[[np.ndarray, np.ndarray, np.ndarray], Calibrator]] = {
    "platt": _fit_platt,
    "isotonic": _fit_isotonic,
}
