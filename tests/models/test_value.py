"""The value of a candidate: its formula, and that stages with the same probabilities agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raysys.errors import UserError
from raysys.models.value import Value
from raysys.schema import FeatureSchema, Label
from raysys.train.funnel_metrics import recall_at, value_recall_at

RNG = np.random.default_rng(0)
BID = np.exp(RNG.normal(size=60) / 2)
P = {task: RNG.random(60) for task in ("click", "conversion", "hide", "like")}
REQUEST = np.repeat(np.arange(3), 20)


def test_the_formula_by_hand_for_arrays_and_tensors():
    value = Value(["click", "conversion"], {"hide": -2.0, "like": 0.5})
    expected = BID * P["click"] * P["conversion"] - 2 * P["hide"] + 0.5 * P["like"]
    np.testing.assert_allclose(value(BID, P), expected, rtol=1e-14)
    tensors = {task: torch.from_numpy(p) for task, p in P.items()}
    np.testing.assert_allclose(value(torch.from_numpy(BID), tensors).numpy(), expected, rtol=1e-14)
    assert value.tasks == ("click", "conversion", "hide", "like")


def test_without_event_weights_it_is_the_bid_times_the_factors():
    alone = Value(["click", "conversion"])
    weightless = Value(["click", "conversion"], {"hide": 0.0, "like": 0.0})
    np.testing.assert_array_equal(weightless(BID, P), alone(BID, P))
    np.testing.assert_array_equal(alone(BID, P), BID * P["click"] * P["conversion"])
    np.testing.assert_array_equal(Value()(BID, P), BID)  # showing is paid


def test_an_early_stage_with_the_final_probabilities_finds_all():
    value = Value(["click"], {"hide": -0.3})
    early = value(BID, {task: p.copy() for task, p in P.items()})
    for n in (5, 8, 20):
        assert recall_at(value(BID, P), early, REQUEST, 5, n) == 1
    gained = Value(["click"], {"like": 0.3})(BID, P)
    assert value_recall_at(gained, gained, REQUEST, 5, 5) == 1
    assert recall_at(value(BID, P), Value(["click"])(BID, P), REQUEST, 5, 5) < 1  # another formula does not


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Value(["clik"]), "objective.value.factors: no binary task 'clik' in schema"),
        (Value([], {"stars": -1}), "objective.value.events: no binary task 'stars' in schema"),
    ],
)
def test_tasks_that_are_not_there_are_named(value, message):
    schema = FeatureSchema(labels=(Label("click"), Label("stars", "regression")))
    with pytest.raises(UserError) as error:
        value.check(schema, "objective.value")
    assert error.value.message == message
