from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from raysys.errors import UserError
from raysys.nn.calibration import (
    Isotonic,
    Platt,
    calibration_from_dict,
    calibration_to_dict,
    correct_sampling,
    sigmoid,
)

CALIBRATORS = {
    "click": Platt(slope=0.8, intercept=-0.3),
    "like": Isotonic((0.1, 0.2, 1 / 3), (0.05, 0.3, 0.31)),
    "share": Isotonic((0.4,), (0.25,)),
}
P = np.array([[0.0, 1e-9, 0.05, 0.1], [0.15, 0.2, 0.9, 1.0]])


@pytest.mark.parametrize("task", CALIBRATORS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_arrays_and_tensors_agree(task, dtype):
    p = P.astype(dtype)
    array, tensor = CALIBRATORS[task](p), CALIBRATORS[task](torch.from_numpy(p))
    assert (array.dtype, tuple(tensor.shape)) == (dtype, p.shape)
    np.testing.assert_allclose(tensor.numpy(), array, rtol=1e-6 if dtype == np.float32 else 1e-12)


def test_maps_by_hand():
    assert Platt(1.0, 0.0)(np.array([0.2]))[0] == pytest.approx(0.2, abs=1e-15)
    assert Platt(2.0, 0.0)(np.array([0.8]))[0] == pytest.approx(0.64 / (0.64 + 0.04))
    np.testing.assert_allclose(CALIBRATORS["like"](np.array([0.0, 0.15, 0.2, 0.9])), [0.05, 0.175, 0.3, 0.31])
    np.testing.assert_allclose(CALIBRATORS["share"](P), 0.25)


def test_the_state_survives_json_bit_for_bit():
    assert calibration_from_dict(json.loads(json.dumps(calibration_to_dict(CALIBRATORS)))) == CALIBRATORS


def test_an_unknown_kind_is_named():
    with pytest.raises(UserError) as error:
        calibration_from_dict({"click": {"kind": "plat"}})
    assert error.value.message == "calibration of task 'click': unknown kind 'plat'"
    assert error.value.hint == "did you mean 'platt'?"


def test_correct_sampling_of_arrays_and_tensors():
    np.testing.assert_allclose(correct_sampling(np.array([0.5, 0.0, 1.0]), 0.25), [0.2, 0, 1])
    np.testing.assert_allclose(correct_sampling(torch.tensor([0.5, 0.0, 1.0]), 0.25).numpy(), [0.2, 0, 1])


def test_sigmoid_keeps_small_probabilities():
    z = np.array([-800.0, -50.0, 0.0, 3.0, 800.0])
    np.testing.assert_allclose(sigmoid(z), [0, np.exp(-50.0), 0.5, 1 / (1 + np.exp(-3.0)), 1], rtol=1e-14)
