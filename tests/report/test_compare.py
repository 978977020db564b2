from __future__ import annotations

import copy
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from raysys.errors import UserError
from raysys.plain import ConfigDifference
from raysys.report.compare import (
    MetricDifference,
    compare,
    render_comparison,
)
from raysys.train import intervals


def log_loss(labels, probabilities):
    return -(labels * np.log(probabilities) + (1 - labels) * np.log1p(-probabilities))


def paired_interval(labels, weights, p_a, p_b, metric):
    """Of the log-loss, whatever the metric is called; fails where rows are not those of the same examples."""
    rows = log_loss(labels, p_b) - log_loss(labels, p_a)
    half = 1.96 * rows.std() / np.sqrt(len(rows))
    assert set(np.unique(weights)) == {1.0}
    return rows.mean(), rows.mean() - half, rows.mean() + half


def no_interval(*_):
    raise AssertionError("there is nothing to compute an interval from")


@pytest.fixture
def pair(make_run, events, record, make_predictions):
    """Two runs on the same examples, saved in another order; B knows more."""
    other = copy.deepcopy(record) | {"run_id": "better"}
    other["config"]["train"]["optimizers"]["dense"]["lr"] = 0.002
    other["metrics"]["test"]["like"]["ne"] -= 0.05
    a, b = make_run("a", events, record), make_run("b", events, other)
    make_predictions(a, seed=1, skill=0.6)
    make_predictions(b, seed=2, skill=0.95)
    return a, b


def find(comparison, split, task, metric):
    return next(row for row in comparison.metrics if (row.split, row.task, row.metric) == (split, task, metric))


def test_rows_are_joined_by_example_and_the_better_run_is_told(pair):
    comparison = compare(*pair, paired_interval)
    assert (comparison.a, comparison.b) == ("dhen-movielens", "better")
    assert comparison.config == [ConfigDifference("train.optimizers.dense.lr", 0.001, 0.002)]
    row = find(comparison, "test", "like", "log_loss")
    tables = [pq.read_table(folder / "predictions/test.parquet").sort_by("example_id").to_pydict() for folder in pair]
    known = np.array(tables[0]["like_weight"]) > 0
    assert known.sum() == 1800
    labels = np.array(tables[0]["like_label"], float)[known]
    losses = [log_loss(labels, np.array(table["like_probability"])[known]).mean() for table in tables]
    assert row.difference == pytest.approx(losses[1] - losses[0], abs=1e-12)
    assert row.low < row.difference < row.high < 0
    assert row.verdict == "better"


def test_what_has_no_interval_still_has_its_difference(pair, record):
    comparison = compare(*pair, paired_interval)
    valid = find(comparison, "valid", "like", "ne")
    assert (valid.difference, valid.low, valid.verdict) == (0.0, None, "")
    gauc = find(comparison, "test", "like", "gauc")
    assert (gauc.a, gauc.difference, gauc.low) == (0.71, 0.0, None)
    assert find(comparison, "test", "finish", "gauc").difference is None
    note = f"valid: no intervals: {pair[0]}/predictions/valid.parquet and {pair[1]}/predictions/valid.parquet not there"
    assert comparison.notes == [note, "test: no intervals for finish: it is not in the predictions of both runs"]


@pytest.mark.parametrize(
    ("metric", "low", "high", "verdict"),
    [
        ("ne", -2, -1, "better"),
        ("ne", 1, 2, "worse"),
        ("auc", 1, 2, "better"),
        ("auc", -2, -1, "worse"),
        ("auc", -1, 1, "same"),
        ("calibration", 1, 2, ""),
        ("ne", None, None, ""),
    ],
)
def test_verdicts_know_which_way_is_good(metric, low, high, verdict):
    assert MetricDifference("test", "like", metric, 1, 2, 1, low, high).verdict == verdict


def test_intervals_of_training_fit_in(pair):
    row = find(compare(*pair, intervals.paired_interval), "test", "like", "auc")
    assert 0 < row.low < row.difference < row.high
    assert row.verdict == "better"


def test_an_undefined_interval_is_none_and_gives_no_verdict(pair):
    row = find(compare(*pair, lambda *_: (np.nan, np.nan, np.nan)), "test", "like", "ne")
    assert row.difference == pytest.approx(-0.05)
    assert (row.low, row.high, row.verdict) == (None, None, "")


def test_examples_that_only_one_run_has_are_left_out_and_told(make_run, events, record, make_predictions):
    a, b = make_run("a", events, record), make_run("b", events, record)
    make_predictions(a, ids=range(2000))
    make_predictions(b, ids=range(500, 2000))
    comparison = compare(a, b, paired_interval)
    assert (
        "test: differences with an interval are over the 1,500 examples that both runs predicted, of 2,000"
        in comparison.notes
    )
    assert find(comparison, "test", "like", "ne").low is not None


def test_other_examples_or_labels_have_no_interval(make_run, events, record, make_predictions):
    a, b, c = (make_run(name, events, record) for name in "abc")
    make_predictions(a)
    make_predictions(b, ids=range(5000, 7000))
    assert "test: no intervals: the runs predicted different examples" in compare(a, b, no_interval).notes
    table = pq.read_table(a / "predictions/test.parquet")
    flipped = np.array(
        [1 - x if i < 3 and x is not None else x for i, x in enumerate(table["like_label"].to_pylist())], object
    )
    expected = sum(x is not None for x in flipped[:3])
    assert expected > 0
    (c / "predictions").mkdir()
    changed = table.set_column(1, "like_label", pa.array(flipped.tolist(), pa.float32()))
    pq.write_table(changed, c / "predictions/test.parquet")  # one file instead of a folder
    note = f"test: no intervals for like: the runs have other labels for {expected} of the same examples"
    assert note in compare(a, c, no_interval).notes


def test_runs_without_a_common_evaluation(make_run, events, record):
    a, b = make_run("a", events[:5]), make_run("b", events, record)
    comparison = compare(a, b, no_interval)
    assert comparison.metrics == []
    assert comparison.notes == ["no split was evaluated in both runs"]


def test_bad_predictions_are_named(pair):
    folder = pair[0]
    path = folder / "predictions/test.parquet"
    table = pq.read_table(path)
    for file in path.iterdir():
        file.unlink()
    pq.write_table(pa.concat_tables([table, table.slice(0, 1)]), path / "part-00000.parquet")
    with pytest.raises(UserError, match=r"test\.parquet: column 'example_id' has repeated values"):
        compare(*pair, no_interval)
    pq.write_table(table.drop(["example_id"]), path / "part-00000.parquet")
    with pytest.raises(UserError, match=r"test\.parquet: no column 'example_id'"):
        compare(*pair, no_interval)


def test_the_table_and_the_json(pair):
    comparison = compare(*pair, paired_interval)
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render_comparison(comparison))
    text = console.export_text()
    assert "train.optimizers.dense.lr" in text
    (line,) = [line for line in text.splitlines() if line.split()[:3] == ["test", "like", "NE"]]
    assert line.split()[3:5] == ["0.79635", "0.74635"]
    assert line.split()[-1] == "better"
    assert "note: valid: no intervals" in text
    content = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert content["metrics"][0].keys() == {"split", "task", "metric", "a", "b", "difference", "low", "high", "verdict"}
    assert content["config"] == [{"key": "train.optimizers.dense.lr", "a": 0.001, "b": 0.002}]


def test_runs_of_one_name_are_told_apart(make_run, events, record):
    a, b = make_run("a", events, record), make_run("b", events, record)
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render_comparison(compare(a, b, no_interval)))
    text = console.export_text()
    assert "the configs are the same" in text
    assert "A: dhen-movielens" in text
