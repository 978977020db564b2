"""Is the model right on what it would choose? Calibration by depth of selection within a request, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

DEPTHS = (1, 5, 20, 100)
"""Candidates that are chosen of each request, as far as there are more of them; at last all."""


def calibration_by_depth(
    prediction: ArrayLike, reference: ArrayLike, weight: ArrayLike, request: ArrayLike
) -> list[dict[str, Any]]:
    """For k in `DEPTHS` and for all: what is predicted, and what is true, of the k highest predictions of each request.

    prediction, reference (labels, or probabilities of a teacher), weight, request: [R]. Rows of weight 0 take their places
    and are not summed. Rows with equal predictions share their places evenly. Values: depth (None: all), rows (a
    fraction where places are shared), predicted Σ w p, reference Σ w r. predicted / reference is the calibration: an estimate
    that is right on average is too high for what it ranks first, the more the noisier it is (the winner's curse).
    """
    p, r, w = (np.asarray(values, np.float64) for values in (prediction, reference, weight))
    above, tied = places(p, np.asarray(request))
    largest, found = (above + tied).max(initial=0), []
    for depth in (*(depth for depth in DEPTHS if depth < largest), None):
        share = np.ones(len(p)) if depth is None else np.clip((depth - above) / tied, 0, 1)
        counted = w > 0
        share, mass = share[counted], (share * w)[counted]
        sums = {"predicted": float(mass @ p[counted]), "reference": float(mass @ r[counted])}
        found.append({"depth": depth, "rows": float(share.sum()), **sums})
    return found


def places(score: NDArray[np.float64], request: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[R] rows of the same request with a higher score, and those with the same score, the row itself included."""
    order = np.lexsort((-score, request))
    sorted_score, sorted_request = score[order], request[order]
    new_request = np.concatenate([[True], sorted_request[1:] != sorted_request[:-1]])[: len(score)]
    new_score = new_request | np.concatenate([[True], sorted_score[1:] != sorted_score[:-1]])[: len(score)]
    first, start = np.flatnonzero(new_request), np.flatnonzero(new_score)
    size = np.diff(np.append(start, len(score)))
    of_request = np.cumsum(new_request)[start] - 1
    above, tied = np.empty(len(score), np.int64), np.empty(len(score), np.int64)
    above[order], tied[order] = np.repeat(start - first[of_request], size), np.repeat(size, size)
    return above, tied
