"""Calibration by depth of selection, against a loop over requests."""

import numpy as np
import pytest

from raysys.train.selection import DEPTHS, calibration_by_depth


def test_it_sums_the_highest_predictions_of_each_request():
    random = np.random.default_rng(0)
    request, prediction = random.integers(0, 40, 3000), random.random(3000)
    reference, weight = random.random(3000), random.random(3000) * (random.random(3000) < 0.6)
    found = calibration_by_depth(prediction, reference, weight, request)
    assert [one["depth"] for one in found] == [*DEPTHS, None]
    for one in found:
        chosen = []
        for group in range(40):
            rows = np.flatnonzero(request == group)
            chosen += rows[np.argsort(-prediction[rows])][: one["depth"]].tolist()
        assert one["rows"] == np.count_nonzero(weight[chosen])
        assert one["predicted"] == pytest.approx((weight * prediction)[chosen].sum())
        assert one["reference"] == pytest.approx((weight * reference)[chosen].sum())


def test_rows_with_equal_predictions_share_their_places():
    found = calibration_by_depth([0.5, 0.5, 0.9, 0.1], [1, 0, 0, 0], np.ones(4), ["a", "a", "b", "b"])
    assert found[0] == {"depth": 1, "rows": 2, "predicted": 0.5 + 0.9, "reference": 0.5}


def test_rows_without_weight_take_places_and_are_not_summed():
    found = calibration_by_depth([0.9, 0.8], [np.nan, 1.0], [0, 1], [7, 7])
    assert found[0] == {"depth": 1, "rows": 0, "predicted": 0, "reference": 0}
    assert found[1] == {"depth": 5, "rows": 1, "predicted": 0.8, "reference": 1}


def test_without_rows_all_is_zero():
    assert {one["rows"] for one in calibration_by_depth([], [], [], [])} == {0}
