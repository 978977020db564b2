"""Served requests are what training sees, or what differs is named."""

from __future__ import annotations

import copy
import json
import runpy
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from raysys.bundle import load_bundle, write_bundle
from raysys.data.log import ParquetLog
from raysys.data.prepare.movielens import prepare
from raysys.data.transforms import Transforms
from raysys.errors import UserError
from raysys.models.ranking.dcn import DCNv2
from raysys.schema import FeatureSchema
from raysys.serve.skew import ServedRequest, check_skew, read_served

ROOT = Path(__file__).parents[2]
SIZES = (1, 3, 40)


def serve(bundle, table, size):
    """What a server logs that answers the rows of a table in requests of this size, after a round through JSON."""
    requests = []
    for number, start in enumerate(range(0, len(table), size)):
        rows = json.loads(json.dumps(table[start : start + size].to_pylist(), default=str))
        requests.append(ServedRequest(f"r{number}", "v1", rows, bundle.predict(rows).tolist()))
    return requests


def write_log(path, requests):
    path.write_text("".join(json.dumps(vars(request)) + "\n" for request in requests))
    return path


@pytest.fixture(scope="module")
def bundle(tiny_run):
    return load_bundle(tiny_run / "bundle")


@pytest.fixture(scope="module")
def log(tiny_data, bundle):
    return ParquetLog(tiny_data / "test.parquet", bundle.schema, labels=False)


@pytest.fixture(scope="module")
def served_once(tiny_data, bundle):
    return serve(bundle, pq.read_table(tiny_data / "test.parquet").drop(["click", "spend"])[:120], 40)


@pytest.fixture
def served(served_once):
    """Three requests of 40 rows, to be changed."""
    return copy.deepcopy(served_once)


def names(differences):
    return [difference.name for difference in differences]


@pytest.mark.parametrize("size", SIZES)
def test_a_thousand_rows_served_and_trained_on_agree(bundle, tiny_data, size):
    table = pq.read_table(tiny_data / "train.parquet")[:1000].drop(["click", "spend"])
    log = ParquetLog(tiny_data / "train.parquet", bundle.schema)
    report = check_skew(serve(bundle, table, size), bundle, log, tolerance=0)
    assert (report.rows, report.rows_in_log, report.skewed) == (1000, 1000, False)
    assert report.requests == -(-1000 // size)


def test_movielens_agrees_too(tmp_path_factory):
    folder = tmp_path_factory.mktemp("movielens")
    prepare(folder / "data", downloads=ROOT / "data" / "downloads")
    schema = FeatureSchema.load(folder / "data" / "schema.yaml")
    transforms = Transforms.fit(schema, ParquetLog(folder / "data" / "train.parquet", schema))
    config = {"_target_": "raysys.models.ranking.dcn.DCNv2"}
    weights = DCNv2(schema).state_dict()
    bundle = load_bundle(write_bundle(folder / "bundle", config, schema, transforms, weights, {}, {}))
    table = pq.read_table(folder / "data" / "test.parquet")[:1000].drop(list(schema.tasks))
    log = ParquetLog(folder / "data" / "test.parquet", schema)
    report = check_skew(serve(bundle, table, 25), bundle, log, tolerance=0)
    assert (report.requests, report.rows_in_log, report.skewed) == (40, 1000, False)


def test_features_that_differ_are_named_counted_and_shown(bundle, log, served):
    for row in served[1].rows[:5]:
        row["price"] += 0.001
    served[2].rows[7]["history"] = [*served[2].rows[7]["history"], 3]
    del served[0].rows[2]["age"]
    served[0].rows[2]["tags"] = None
    raw = pq.read_table(log.path).to_pylist()
    known = {row["row"]: row for row in raw}
    changed = known[served[0].rows[2]["row"]]
    expected = {"price": 5, "history": 1}
    expected |= {"age": 1} if changed["age"] is not None else {}
    expected |= {"tags": 1} if changed["tags"] else {}
    report = check_skew(served, bundle, log, tolerance=10, examples=2)
    assert {difference.name: difference.rows for difference in report.features} == expected
    assert report.skewed
    assert not report.predictions
    price = report.features[0]
    assert price.name == "price"
    assert [(example["request_id"], example["row"]) for example in price.examples] == [("r1", 0), ("r1", 1)]
    for example in price.examples:
        assert example["served"]["price"] == example["logged"]["price"] + 0.001
    assert report.to_dict()["skewed"] is True


def test_predictions_that_differ_are_named_counted_and_shown(bundle, log, served):
    served[1].predictions[3][0] += 2e-6
    served[1].predictions[4][0] -= 0.5
    served[2].predictions[0][1] = float("nan")
    report = check_skew(served, bundle, log)
    assert not report.features
    found = {difference.name: difference for difference in report.predictions}
    assert {name: difference.rows for name, difference in found.items()} == {"click": 2, "spend": 1}
    assert found["click"].largest == pytest.approx(0.5, abs=1e-6)
    first, second = found["click"].examples
    assert (first["request_id"], first["row"], second["row"]) == ("r1", 3, 4)
    assert second["served"] - second["computed"] == pytest.approx(-0.5, abs=1e-6)
    assert names(check_skew(served, bundle, tolerance=1e-5).predictions) == ["click", "spend"]
    served[1].predictions[4][0] += 0.5
    assert names(check_skew(served, bundle, tolerance=1e-5).predictions) == ["spend"]


def test_another_model_predicts_something_else(bundle, served):
    with torch.no_grad():
        other = copy.deepcopy(bundle)
        for parameter in other.model.towers.parameters():
            parameter.mul_(1.1)
    report = check_skew(served, other)
    assert set(names(report.predictions)) == {"click", "spend"}
    assert all(difference.rows > 100 for difference in report.predictions)


def test_rows_of_other_versions_and_of_no_log_are_left_out(bundle, log, served):
    other = ServedRequest("x", "v0", served[0].rows, [[0.0, 0.0]] * 40)
    rows = [{key: value for key, value in row.items() if key != "row"} for row in served[0].rows]
    anonymous = ServedRequest("y", "v1", rows, served[0].predictions)
    unknown = copy.deepcopy(served[1])
    for number, row in enumerate(unknown.rows):
        row["row"] = 10**9 + number
    report = check_skew([other, anonymous, unknown, served[2]], bundle, log, model_version="v1")
    assert (report.requests, report.rows, report.rows_in_log, report.other_versions) == (3, 120, 40, 1)
    assert not report.skewed
    assert check_skew([other, served[2]], bundle, log).skewed
    with pytest.raises(UserError, match="no row has the example id of a served one"):
        check_skew([unknown, anonymous], bundle, log)
    with pytest.raises(UserError, match="no request to compare, and 1 of other versions than 'v2'"):
        check_skew([other], bundle, log, model_version="v2")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ("[]", "line 2: no 'request_id'"),
        ('{"request_id": "a", "model_version": "v", "rows": {}, "predictions": []}', "line 2: no 'rows'"),
        ('{"request_id": "a", "model_version": "v", "rows": [1], "predictions": []}', "line 2: a row is no object"),
        ('{"request_id": "a", "model_version": 1, "rows": [{}], "predictions": []}', "line 2: no 'model_version'"),
    ],
)
def test_a_line_that_is_no_request_is_named(tmp_path, served, line, message):
    path = write_log(tmp_path / "served.jsonl", served[:1])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=message):
        list(read_served(path))
    with pytest.raises(UserError, match="nothing: no such file"):
        list(read_served(tmp_path / "nothing"))


@pytest.mark.parametrize("predictions", [[[0.1, 0.2]], [[0.1], [0.2, 0.3]] * 20, [["high", 0.2]] * 40, []])
def test_a_request_that_the_bundle_cannot_answer_is_named(bundle, served, predictions):
    with pytest.raises(UserError, match="request 'r0': predictions are not 40 rows of 2 numbers"):
        check_skew([ServedRequest("r0", "v1", served[0].rows, predictions)], bundle)
    for row in served[0].rows:
        del row["item"]
    with pytest.raises(UserError, match="request 'r0': rows: column 'item' is missing"):
        check_skew(served, bundle)


def test_a_log_is_joined_by_example_id_only(bundle, tiny_data, served, tmp_path):
    path = tmp_path / "log.parquet"
    pq.write_table(pq.read_table(tiny_data / "test.parquet").drop(["row"]), path)
    with pytest.raises(UserError, match="served rows are found in a log by their example id, and it has none"):
        check_skew(served, bundle, ParquetLog(path, bundle.schema, labels=False))


@pytest.mark.parametrize("skewed", [False, True])
def test_the_job_ends_with_1_where_something_differs(
    tiny_run, tiny_data, served, tmp_path, monkeypatch, capsys, skewed
):
    if skewed:
        served[0].rows[0]["price"] = 1e3
    served = write_log(tmp_path / "served.jsonl", served)
    arguments = {"bundle": tiny_run / "bundle", "served": served, "log": tiny_data / "test.parquet"}
    arguments["output"] = tmp_path / "skew.json"
    monkeypatch.setattr(sys, "argv", ["skew", *(f"{key}={value}" for key, value in arguments.items())])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / "jobs" / "skew.py"), run_name="__main__")
    assert exit.value.code == int(skewed)
    out, report = capsys.readouterr().out, json.loads((tmp_path / "skew.json").read_text())
    assert "3 requests with 120 rows, 120 of them found in the log" in out
    assert report["skewed"] is skewed
    assert [(feature["name"], feature["rows"]) for feature in report["features"]] == ([("price", 1)] if skewed else [])
    assert ("feature price" in out, "nothing differs" in out) == (skewed, not skewed)
    assert [prediction["name"] for prediction in report["predictions"]] == (["click", "spend"] if skewed else [])
