"""Simulation A of UKDSL's brief: selecting by a noisy estimate makes it too high for what was selected."""

from __future__ import annotations

import numpy as np
import pytest

CALIBRATION = {
    0.0: (1.00, 1.00, 1.00, 1.00, 1.00),
    0.25: (1.08, 1.07, 1.06, 1.02, 1.00),
    0.5: (1.31, 1.28, 1.21, 1.07, 1.00),
    1.0: (2.23, 2.09, 1.78, 1.22, 1.00),
}


@pytest.mark.parametrize("noise", CALIBRATION)
def test_simulation_a_selection_makes_predictions_too_high(noise):
    random = np.random.default_rng(3)
    true = random.normal(-3, 1, (4000, 200))
    logit = true + random.normal(0, noise, true.shape)
    p = sigmoid(true)
    low, high = -10.0, 10.0
    for _ in range(30):  # the shift with which the mean prediction is right over all candidates
        shift = (low + high) / 2
        low, high = (low, shift) if sigmoid(logit + shift).mean() > p.mean() else (shift, high)
    tolerance = 0.1 if noise == 1.0 else 0.03
    assert selected_calibration(sigmoid(logit + shift), p) == pytest.approx(CALIBRATION[noise], abs=tolerance)
    variance = noise**2 / (1 + noise**2)  # of the true logit, given the noisy one
    points, weights = np.polynomial.hermite_e.hermegauss(21)
    mean = -3 + (logit + 3) / (1 + noise**2)
    posterior = sum(w * sigmoid(mean + variance**0.5 * x) for x, w in zip(points, weights / weights.sum(), strict=True))
    assert selected_calibration(posterior, p) == pytest.approx([1.0] * 5, abs=0.02)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def selected_calibration(prediction: np.ndarray, p: np.ndarray) -> list[float]:
    """Predicted over true for the k candidates of each request with the highest predictions."""
    order = np.argsort(-prediction, 1)
    ranked, true = np.take_along_axis(prediction, order, 1), np.take_along_axis(p, order, 1)
    return [float(ranked[:, :k].sum() / true[:, :k].sum()) for k in (1, 5, 20, 100, 200)]
