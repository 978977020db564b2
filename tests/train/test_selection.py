"""Calibration by depth of selection, against a loop over requests."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from raysys.schema import ExtraColumn, FeatureSchema, Label
from raysys.train.metrics import Evaluator
from raysys.train.selection import DEPTHS, calibration_by_depth


def test_it_sums_the_highest_predictions_of_each_request():
    random = np.random.default_rng(0)
    request, prediction = random.integers(0, 20, 3000), random.random(3000)
    reference, weight = random.random(3000), random.random(3000) * (random.random(3000) < 0.6)
    found = calibration_by_depth(prediction, reference, weight, request)
    assert [one["depth"] for one in found] == [*DEPTHS, None]
    for one in found:
        chosen = []
        for group in range(20):
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
    assert found[1:] == [{"depth": None, "rows": 1, "predicted": 0.8, "reference": 1}]  # no request has five


def test_without_rows_all_is_zero():
    assert calibration_by_depth([], [], [], []) == [{"depth": None, "rows": 0, "predicted": 0, "reference": 0}]


def test_an_evaluation_compares_with_labels_where_there_are_some_and_else_with_the_teacher():
    schema = FeatureSchema(
        labels=(Label("click", required=False),), extra=(ExtraColumn("teacher"),), group_id="request"
    )
    nan, logits = float("nan"), torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0, 4.0])
    weight = torch.tensor([1.0, 0, 0, 1, 0, 0])
    batch = SimpleNamespace(
        labels=torch.tensor([1.0, 0, 0, 0, 0, 0])[:, None],
        weight=weight[:, None],
        example_id=torch.tensor([0, 1, 2, 3, 4, -1]),  # the last one is padding
        group_id=torch.tensor([5, 5, 5, 5, 6, 6]),
        extra={"teacher": torch.tensor([0.9, 0.6, nan, 0.3, 0.5, 0.5])},
    )
    evaluator = Evaluator(schema, teachers={"click": "teacher"})
    evaluator.update(logits[:, None], batch)
    found, p = evaluator.compute()["selection"]["click"], logits.sigmoid().tolist()
    expected = {
        "labels": [(1, p[0], 1), (2, p[0] + p[3], 1)],  # the first of request 5, and all
        "teacher": [(1, p[4], 0.5), (2, p[4] + p[1], 1.1)],  # the first of 6; the third of 5 has no teacher
    }
    for part, depths in expected.items():
        assert [one["depth"] for one in found[part]] == [1, None]
        assert [tuple(one.values())[1:] for one in found[part]] == [pytest.approx(depth) for depth in depths]
    assert Evaluator(schema).compute()["selection"] == {}
