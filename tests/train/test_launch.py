"""Workers in this process and on Ray: a dead one is replaced, an error of the user ends all of them at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist

from raysys.bundle import load_bundle
from raysys.errors import UserError
from raysys.train.checkpoint import checkpoint_path, list_checkpoints
from raysys.train.export import export_run
from raysys.train.launch import STOP_FILE, launch, relative_in_ray_job
from raysys.train.predict import predict
from raysys.train.record import read_record
from raysys.train.trainer import fit, prepare

RAY = ["trainer=ray", "model.dropout=0", "train.checkpoint={every_steps: 3, keep: 9}"]


def test_a_ray_job_is_told_of_folders_that_will_vanish(monkeypatch):
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

    clicks = {"data.folder": "data/clicks"}
    monkeypatch.delenv(RAY_JOB_CONFIG_JSON_ENV_VAR, raising=False)
    assert relative_in_ray_job(clicks) is None
    monkeypatch.setenv(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}")
    told = "will be in Ray's temporary copy of the working directory, and vanish with it: give an absolute path"
    assert relative_in_ray_job({"runs_folder": "/shared/runs", **clicks}).startswith(f"data.folder=data/clicks {told}")
    both = f"runs_folder=runs and data.folder=data/clicks {told}"
    assert relative_in_ray_job({"runs_folder": "runs", **clicks}).startswith(both)
    assert relative_in_ray_job({"runs_folder": "/shared/runs", "data.folder": "s3://bucket/clicks"}) is None


def train_on_ray(config):
    prepared, events = prepare(config), []
    return prepared.job.folder, fit(prepared, [events.append]), events


def test_a_local_worker_runs_in_this_process_with_a_group_of_its_own(tiny_config):
    job, events = prepare(tiny_config()).job, []

    def work(worker):
        worker.emit({"event": "seen"})
        return os.getpid(), dist.get_world_size(), worker.device.type, worker.stop_wanted()

    assert launch(job, work, events.append) == (os.getpid(), 1, "cpu", False)
    assert events == [{"event": "seen"}]
    assert not dist.is_initialized()


def wait_for_stop(worker, signalled=True):
    if signalled:
        os.kill(os.getpid(), signal.SIGTERM)
    else:
        (worker.job.folder / STOP_FILE).touch()
    deadline = time.monotonic() + 20
    while not worker.stop_wanted() and time.monotonic() < deadline:
        time.sleep(0.05)
    return worker.stop_wanted()


def test_sigterm_and_a_file_ask_to_stop(tiny_config):
    job, before = prepare(tiny_config()).job, signal.getsignal(signal.SIGTERM)
    assert launch(job, wait_for_stop, print)
    assert signal.getsignal(signal.SIGTERM) is before
    assert launch(job, partial(wait_for_stop, signalled=False), print, can_stop=False)
    assert not launch(job, lambda worker: worker.stop_wanted(), print)  # what was asked of a run before is forgotten


@pytest.fixture(scope="module")
def undisturbed(ray_cluster, tiny_config_in, tmp_path_factory):
    """A run of 2 workers, 10 steps, row-wise tables: its folder, outcome and events."""
    options = ["objective=faulty", "train.sharding.sharding_types=[row_wise]", "run_id=undisturbed"]
    return train_on_ray(tiny_config_in(tmp_path_factory.mktemp("runs"), *RAY, *options))


def test_two_workers_train_evaluate_and_export(undisturbed, tiny_data, tiny_config_in, tmp_path):
    folder, outcome, events = undisturbed
    assert (outcome.status, outcome.step) == ("finished", 10)
    record = read_record(folder)
    assert (record["status"], record["world_size"], len(record["bytes_per_rank"])) == ("finished", 2, 2)
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, 11))
    assert [event["rows"] for event in steps] == list(range(150, 1501, 150))
    assert [event["event"] for event in events[-2:]] == ["embedding_health", "run_finished"]
    alone, expected = prepare(tiny_config_in(tmp_path, *RAY, "trainer=local")), []
    fit(alone, [expected.append])
    losses = [event["loss"] for event in expected if event["event"] == "step"]
    np.testing.assert_allclose([event["loss"] for event in steps], losses, rtol=1e-5)
    table = pq.read_table(folder / "predictions" / "test.parquet")
    assert sorted(table["example_id"].to_pylist()) == list(range(1800, 2101))
    found = load_bundle(export_run(folder, output=tmp_path / "bundle")).predict(
        pq.read_table(tiny_data / "test.parquet")
    )
    in_order = table.take(np.argsort(table["example_id"].to_numpy()))
    np.testing.assert_allclose(found[:, 0], in_order["click_probability"].to_numpy(), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found[:, 1], in_order["spend_probability"].to_numpy(), rtol=1e-6, atol=1e-6)


def test_a_killed_worker_is_replaced_and_nothing_is_lost(undisturbed, tiny_config, tensors_of, tmp_path):
    fault = ["objective.fault=kill", "objective.step=5", "objective.rank=1", f"objective.marker={tmp_path}/killed"]
    options = ["objective=faulty", "train.sharding.sharding_types=[row_wise]", *fault]
    folder, outcome, events = train_on_ray(tiny_config(*RAY, *options))
    assert (tmp_path / "killed").exists()
    assert (outcome.status, outcome.step) == ("finished", 10)
    assert [event["step"] for event in events if event["event"] == "resumed"] == [3]
    for step in (6, 10):
        path = checkpoint_path(folder / "checkpoints", step)
        assert tensors_of(path) == tensors_of(checkpoint_path(undisturbed[0] / "checkpoints", step))
    assert outcome.metrics == undisturbed[1].metrics


@pytest.mark.parametrize(
    ("kind", "workers"), [pytest.param("table_wise", 3, marks=pytest.mark.soak), ("column_wise", 1)]
)
def test_a_checkpoint_loads_under_another_plan_and_number_of_workers(
    undisturbed, tiny_config, tensors_of, kind, workers
):
    origin = checkpoint_path(undisturbed[0] / "checkpoints", 10)
    layout = [f"train.sharding.sharding_types=[{kind}]", f"trainer.workers={workers}", f"resume={origin}"]
    folder, outcome, events = train_on_ray(tiny_config(*RAY, "objective=faulty", *layout))
    assert not [event for event in events if event["event"] == "step"]
    assert tensors_of(checkpoint_path(folder / "checkpoints", 10)) == tensors_of(origin)
    found, expected = (result.metrics["test"]["click"] for result in (outcome, undisturbed[1]))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.soak
def test_a_bad_row_ends_all_workers_with_one_error(ray_cluster, tiny_data, tiny_config, tmp_path):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    train = pq.read_table(data / "train.parquet")
    labels = train["click"].to_numpy().copy()
    labels[1400] = 3  # in the last shard, which rank 1 reads; the rows before it are good for some steps
    column = train.column_names.index("click")
    pq.write_table(train.set_column(column, "click", pa.array(labels)), data / "train.parquet", row_group_size=400)
    options = [
        "data.shuffle_rows=0",
        "trainer=ray",
        "train.checkpoint.every_steps=1",
        f"data.folder={data}",
        "run_id=a",
    ]
    prepared, events = prepare(tiny_config(*options, "data.prefetch=0")), []
    with pytest.raises(UserError) as caught:
        fit(prepared, [events.append])
    assert f"{data}/train.parquet, row group 3" in caught.value.message
    assert "'click'" in caught.value.message
    record = read_record(prepared.job.folder)
    assert (record["status"], record["message"]) == ("failed", caught.value.message)
    assert not [event for event in events if event["event"] == "resumed"]  # it was not tried again
    assert json.loads((prepared.job.folder / "failure.json").read_text())["message"] == caught.value.message


def test_two_workers_score_each_row_once(undisturbed, tiny_run, tiny_data, tmp_path):
    trainer = {"kind": "ray", "workers": 2, "device": "cpu"}
    assert predict(tiny_run, str(tiny_data / "test.parquet"), tmp_path / "scores", trainer) == 301
    predict(tiny_run, str(tiny_data / "test.parquet"), tmp_path / "alone", {"kind": "local", "device": "cpu"})
    found, expected = (pq.read_table(tmp_path / name).sort_by("example_id") for name in ("scores", "alone"))
    assert found["example_id"] == expected["example_id"]
    for column in ("click_probability", "spend_prediction"):
        np.testing.assert_allclose(found[column].to_numpy(), expected[column].to_numpy(), rtol=1e-5, atol=1e-6)
    assert len(list((tmp_path / "scores").iterdir())) == 2


def test_more_workers_than_the_cluster_can_start_are_refused(ray_cluster, tiny_config):
    prepared = prepare(tiny_config("trainer=ray", "trainer.workers=5"))
    with pytest.raises(UserError, match=r"5 workers need 5 CPU, Ray has 4\n  hint: lower trainer.workers"):
        fit(prepared, [])


@pytest.mark.soak
def test_a_hung_worker_is_found_and_replaced(undisturbed, tiny_config, tensors_of, tmp_path):
    fault = ["objective.fault=stop", "objective.step=5", "objective.rank=1", f"objective.marker={tmp_path}/stopped"]
    options = ["objective=faulty", "train.sharding.sharding_types=[row_wise]", "trainer.hang_timeout_s=15", *fault]
    folder, outcome, events = train_on_ray(tiny_config(*RAY, *options))
    assert outcome.status == "finished"
    assert [event["step"] for event in events if event["event"] == "resumed"] == [3]
    found, expected = (tensors_of(checkpoint_path(run / "checkpoints", 10)) for run in (folder, undisturbed[0]))
    assert found == expected


@pytest.mark.soak
def test_a_loss_that_is_not_finite_is_not_tried_again(ray_cluster, tiny_config):
    fault = ["objective.fault=not_finite", "objective.step=5", "objective.rank=1"]
    prepared, events = prepare(tiny_config(*RAY, "objective=faulty", *fault)), []
    with pytest.raises(
        UserError, match=r"step 5: loss, click is not finite; the batch is in .*/not_finite_step_5_rank_0\.pt"
    ):
        fit(prepared, [events.append])
    assert not [event for event in events if event["event"] == "resumed"]
    assert [path.name for path in list_checkpoints(prepared.job.checkpoints)] == ["step_00000003"]


@pytest.mark.soak
def test_a_worker_that_always_dies_ends_the_run_in_one_line(ray_cluster, tiny_config):
    fault = ["objective.fault=kill", "objective.step=2"]
    prepared = prepare(tiny_config(*RAY, "objective=faulty", "trainer.max_failures=1", *fault))
    with pytest.raises(UserError, match=r"^the workers failed, also after 1 restarts: .+\n  hint: --debug shows"):
        fit(prepared, [])
    assert read_record(prepared.job.folder)["status"] == "failed"
