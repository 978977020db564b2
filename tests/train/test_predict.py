"""Scores of a log: every row once, the same on any number of workers, and what the bundle says."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from raysys.bundle import load_bundle
from raysys.errors import UserError
from raysys.train.export import open_run
from raysys.train.predict import _plan, predict, predict_worker

LOCAL = {"kind": "local", "device": "cpu", "cpus_per_worker": 1}


def in_order_of_rows(path):
    table = pq.read_table(path)
    return table.take(np.argsort(table["example_id"].to_numpy()))


@pytest.fixture
def log(tiny_data, tmp_path):
    """The rows of the test split without their labels."""
    pq.write_table(pq.read_table(tiny_data / "test.parquet").drop(["click", "spend"]), tmp_path / "log.parquet")
    return tmp_path / "log.parquet"


def test_scores_are_what_evaluation_and_bundle_say(tiny_run, tiny_data, log, tmp_path):
    assert predict(tiny_run, str(log), tmp_path / "scores", LOCAL) == 301
    found = in_order_of_rows(tmp_path / "scores")
    assert found.column_names == ["example_id", "click_probability", "spend_prediction"]
    assert found["example_id"].to_pylist() == list(range(1800, 2101))
    expected = in_order_of_rows(tiny_run / "predictions" / "test.parquet")["click_probability"].to_numpy()
    np.testing.assert_allclose(found["click_probability"].to_numpy(), expected, rtol=1e-6)
    bundle = load_bundle(tiny_run / "bundle").predict(pq.read_table(tiny_data / "test.parquet"))
    np.testing.assert_allclose(found["spend_prediction"].to_numpy(), bundle[:, 1], rtol=1e-5, atol=1e-6)
    assert not list(tmp_path.glob("scores.*"))


def test_a_log_needs_no_column_that_a_score_does_not_depend_on(tiny_run, log, tmp_path):
    predict(tiny_run, str(log), tmp_path / "named", LOCAL)
    named, (first, second) = in_order_of_rows(tmp_path / "named"), [tmp_path / "raw" / f"{n}.parquet" for n in (1, 2)]
    first.parent.mkdir()
    table = pq.read_table(log).drop(["row"])
    pq.write_table(table.slice(0, 100), first)
    pq.write_table(table.slice(100), second)
    predict(tiny_run, str(first.parent), tmp_path / "numbered", LOCAL)
    numbered = in_order_of_rows(tmp_path / "numbered")
    assert numbered["example_id"].to_pylist() == list(range(301))
    np.testing.assert_allclose(numbered["click_probability"], named["click_probability"], rtol=1e-6)
    pq.write_table(pq.read_table(log).slice(100), second)  # numbers could repeat these ids
    with pytest.raises(UserError, match=r"1\.parquet: column 'row' is missing \(example_id\)"):
        predict(tiny_run, str(first.parent), tmp_path / "mixed", LOCAL)


def score(job, plan, log, output, calibration):
    """One rank of a prediction, within the tests' own processes."""
    import torch

    from raysys.train.launch import Worker

    worker = Worker(job, torch.device("cpu"), lambda event: None, lambda: False)
    return predict_worker(worker, plan, log, output, calibration)


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_gives_each_row_once(gloo, tiny_run, log, tmp_path, workers):
    from dataclasses import replace

    job, record = open_run(tiny_run)
    job = replace(job, config=job.config | {"trainer": {"kind": "ray", "workers": workers, "device": "cpu"}})
    job.config["train"]["evaluation_batch_size"] = 50
    plan = _plan(job, str(log), "cpu")
    rows = gloo.run(workers, score, job, plan, str(log), tmp_path / "scores", record["calibration"])
    assert rows == [301] * workers
    assert len(list((tmp_path / "scores").iterdir())) == workers
    predict(tiny_run, str(log), tmp_path / "alone", LOCAL)
    found, expected = in_order_of_rows(tmp_path / "scores"), in_order_of_rows(tmp_path / "alone")
    assert found["example_id"] == expected["example_id"]
    for column in ("click_probability", "spend_prediction"):
        np.testing.assert_allclose(found[column].to_numpy(), expected[column].to_numpy(), rtol=1e-5, atol=1e-6)


def test_nothing_is_overwritten_and_nothing_is_left_of_a_failure(tiny_run, log, tmp_path):
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "mine.txt").touch()
    with pytest.raises(UserError, match=r"scores is there already\n  hint: name a folder that does not exist"):
        predict(tiny_run, str(log), tmp_path / "scores", LOCAL)
    content = bytearray(log.read_bytes())
    content[100:400] = bytes(300)  # the footer is whole, a page is not
    log.write_bytes(content)
    with pytest.raises(UserError, match=r"log\.parquet, row group 0"):
        predict(tiny_run, str(log), tmp_path / "other", LOCAL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.parquet", "scores"]


def test_a_log_without_a_column_is_named_before_anything_starts(tiny_run, log, tmp_path):
    pq.write_table(pq.read_table(log).rename_columns({"price": "prize"}), log)
    with pytest.raises(UserError, match=r"log\.parquet: column 'price' is missing .*\n  hint: did you mean 'prize'"):
        predict(tiny_run, str(log), tmp_path / "scores", LOCAL)
    with pytest.raises(UserError, match=r"nowhere\.parquet: no such file"):
        predict(tiny_run, str(tmp_path / "nowhere.parquet"), tmp_path / "scores", LOCAL)
    with pytest.raises(UserError, match=r"elsewhere: no run"):
        predict(tmp_path / "elsewhere", str(log), tmp_path / "scores", LOCAL)


def test_tables_of_a_run_on_another_device_are_placed_anew(tiny_run, log):
    job, _ = open_run(tiny_run)
    config = json.loads(json.dumps(job.config))
    config["train"]["sharding"]["tables"] = {"user": {"compute_kernels": ["fused_uvm_caching"]}}
    config["train"]["optimizers"]["sparse"]["name"] = "adam"  # on CUDA only
    job.config.update(config)
    assert {table.table for table in _plan(job, str(log), "cuda").tables} == {"user", "item", "tag", "brand"}
    with pytest.raises(UserError, match="compute_kernels"):
        _plan(job, str(log), "cpu")
