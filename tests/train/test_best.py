"""Early stopping: which evaluation is the best, and when to stop."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from raysys.errors import UserError
from raysys.schema import FeatureSchema, Label
from raysys.train.best import BestSoFar
from raysys.train.settings import EarlyStopping

SCHEMA = FeatureSchema(labels=(Label("click"), Label("spend", "regression")))


def feed(best, values, first=10):
    return [best.update({"click": {best.settings.metric: value}}, step) for step, value in enumerate(values, first)]


@pytest.mark.parametrize(("metric", "sign"), [("ne", 1), ("log_loss", 1), ("auc", -1)])
def test_the_best_is_the_lowest_loss_or_the_highest_auc(metric, sign):
    best = BestSoFar(EarlyStopping(metric=metric, patience=2), SCHEMA)
    assert feed(best, [sign * value for value in (0.9, 0.8, 0.85, 0.7, 0.7, 0.75)]) == [
        True,
        True,
        False,
        True,
        False,
        False,
    ]
    assert (best.step, best.value, best.evaluated) == (13, sign * 0.7, 15)
    assert best.patience_is_over
    assert best.path(Path("c")) == Path("c/step_00000013")


def test_an_undefined_metric_is_never_the_best():
    best = BestSoFar(EarlyStopping(patience=3), SCHEMA)
    assert feed(best, [math.nan, 0.9, math.nan, 0.8]) == [False, True, False, True]
    assert not best.patience_is_over


def test_a_state_goes_on_where_it_was():
    best = BestSoFar(EarlyStopping(patience=3), SCHEMA)
    feed(best, [0.9, 0.95])
    other = BestSoFar(EarlyStopping(patience=3), SCHEMA)
    other.restore(best.state())
    assert feed(other, [0.92, 0.91], first=12) == [False, False]
    assert other.patience_is_over
    fresh = BestSoFar(EarlyStopping(), SCHEMA)
    fresh.restore(BestSoFar(EarlyStopping(), SCHEMA).state())
    assert feed(fresh, [5.0]) == [True]


def test_nothing_stops_without_settings():
    best = BestSoFar(None, SCHEMA)
    assert not any(best.update({}, step) for step in range(5))
    assert not best.patience_is_over
    assert best.path(Path("c")) is None
    assert best.evaluated == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (EarlyStopping(task="clik"), r"train.early_stopping.task 'clik' is no label\n  hint: did you mean 'click'"),
        (
            EarlyStopping("ne", "spend"),
            r"metric is 'ne', which the regression task 'spend' does not have\n  hint: .*rmse, mae",
        ),
        (EarlyStopping("rmse"), "metric is 'rmse', which the binary task 'click' does not have"),
        (EarlyStopping("gauc"), "metric is 'gauc', but the schema has no group_id"),
    ],
)
def test_a_metric_that_a_task_does_not_have_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        BestSoFar(settings, SCHEMA)


def test_all_watches_the_mean_over_the_tasks_that_have_the_metric():
    schema = FeatureSchema(labels=(Label("click"), Label("spend", "regression"), Label("like")))
    best = BestSoFar(EarlyStopping(metric="ne", task="all", patience=1), schema)
    assert best.update({"click": {"ne": 0.8}, "spend": {}, "like": {"ne": 0.6}}, 1)
    assert best.value == pytest.approx(0.7)
    assert not best.update({"click": {"ne": 0.7}, "spend": {}, "like": {"ne": 0.71}}, 2)
    assert best.patience_is_over
