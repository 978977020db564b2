from __future__ import annotations

import numpy as np
import pytest
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from raysys.errors import UserError
from raysys.train.calibration import fit_calibrator
from raysys.train.ranking_metrics import auc, calibration, log_loss


def rows(n: int = 4000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, over-confident and biased predictions, weights."""
    rng = np.random.default_rng(0)
    truth = rng.normal(-1.5, 1, n)
    label = (rng.random(n) < 1 / (1 + np.exp(-truth))).astype(float)
    return label, 1 / (1 + np.exp(-(2 * truth + 2))), rng.random(n) + 0.1


def test_platt_equals_sklearn():
    label, probability, _ = rows()
    logit = np.log(probability / (1 - probability))[:, None]
    # a classifier whose decision function is the logit itself, calibrated by scikit-learn
    identity = LogisticRegression().fit(logit, label)
    identity.coef_[:], identity.intercept_[:] = 1, 0
    reference = CalibratedClassifierCV(FrozenEstimator(identity), method="sigmoid").fit(logit, label)
    found = fit_calibrator("platt", "click", label, probability)(probability)
    np.testing.assert_allclose(found, reference.predict_proba(logit)[:, 1], atol=1e-5)


def test_isotonic_equals_sklearn():
    label, probability, weight = rows()
    reference = IsotonicRegression(out_of_bounds="clip").fit(probability, label, sample_weight=weight)
    grid = np.linspace(0, 1, 501)
    low, high = 1 / ((1 - label).sum() + 2), 1 - 1 / (label.sum() + 2)
    found = fit_calibrator("isotonic", "click", label, probability, weight)(grid)
    inside = (found > 1.2 * low) & (found < high)
    assert inside.sum() > 400
    np.testing.assert_allclose(found[inside], reference.predict(grid)[inside], atol=1e-12)
    assert np.all(np.diff(found) >= 0)
    assert found.min() > 0
    assert found.max() < 1


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_a_fit_mends_calibration_and_log_loss(method):
    label, probability, weight = rows()
    fitted = fit_calibrator(method, "click", label[::2], probability[::2], weight[::2])(probability[1::2])
    held_out = label[1::2], weight[1::2]
    assert log_loss(held_out[0], fitted, held_out[1]) < log_loss(held_out[0], probability[1::2], held_out[1]) - 0.02
    assert abs(calibration(held_out[0], fitted, held_out[1]) - 1) < 0.1
    assert calibration(held_out[0], probability[1::2], held_out[1]) > 1.2
    if method == "platt":
        assert auc(held_out[0], fitted) == auc(held_out[0], probability[1::2])


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_weights_have_no_scale_and_zeros_are_left_out(method):
    label, probability, weight = rows(500)
    weight[::4] = 0
    kept = weight > 0
    grid = np.linspace(0.01, 0.99, 50)
    reference = fit_calibrator(method, "click", label[kept], probability[kept], weight[kept])(grid)
    found = fit_calibrator(method, "click", label, probability, 1e-4 * weight)(grid)
    np.testing.assert_allclose(found, reference, atol=1e-8)


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_separable_predictions_have_a_finite_fit(method):
    found = fit_calibrator(method, "click", [0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9])(np.array([0.0, 0.5, 1.0]))
    assert np.all((found > 0) & (found < 1))
    assert found[0] < found[2]


def test_one_class_cannot_be_calibrated():
    with pytest.raises(UserError) as error:
        fit_calibrator("platt", "click", [1, 1, 0], [0.5, 0.6, 0.7], [1, 1, 0])
    assert error.value.message == (
        "calibration of task 'click': the 2 labelled rows of the validation split hold fewer than two classes"
    )
    assert error.value.hint == "evaluate on more rows, or set train.calibration to none"
