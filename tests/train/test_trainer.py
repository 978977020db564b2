"""The driver: everything is checked before it starts, the record is true, and the test split is opened at the end only."""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raysys.data.log import ParquetLog
from raysys.errors import UserError
from raysys.train.checkpoint import checkpoint_path
from raysys.train.record import read_record
from raysys.train.trainer import fit, prepare


@pytest.fixture
def data(tiny_data, tmp_path):
    """A copy of the data set, to be spoilt."""
    return shutil.copytree(tiny_data, tmp_path / "data")


def test_prepare_tells_the_size_of_a_run_and_writes_nothing(tiny_config, tmp_path):
    prepared = prepare(tiny_config("run_id=a", "trainer=ray", "train.epochs=3"))
    assert not (tmp_path / "runs").exists()
    facts = prepared.facts
    assert {key: facts[key] for key in ("run_id", "world_size", "device", "tasks")} == {
        "run_id": "a",
        "world_size": 2,
        "device": "cpu",
        "tasks": ["click", "spend"],
    }
    assert (facts["rows_per_epoch"], facts["steps_per_epoch"], facts["total_steps"]) == (1500, 10, 30)
    assert facts["parameters"]["sparse"] == 30 * 16 + 40 * 16 + 20 * 8 + 6 * 16
    dense = sum(p.numel() for p in prepared.job.train_step("cpu").parameters()) - facts["parameters"]["sparse"]
    assert facts["parameters"]["dense"] == dense
    assert sum(facts["bytes_per_rank"]) >= 2 * 4 * facts["parameters"]["sparse"]  # weights and Adagrad's sums
    assert facts["flops_per_row"] > 0


def peak_memory():
    from raysys.train.conclude import peak_memory_bytes

    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return held, peak_memory_bytes(torch.device("cpu"))


def test_peak_memory_is_that_of_the_rank_with_most(gloo):
    held, peaks = zip(*gloo.run(2, peak_memory), strict=True)
    assert held[0] != held[1]
    assert max(held) <= peaks[0] == peaks[1]


def test_a_finished_run_leaves_a_whole_record(train_tiny):
    folder, outcome, events = train_tiny("run_id=a", "train.slices=[brand]")
    record = read_record(folder)
    assert (record["run_id"], record["status"], record["step"], record["world_size"]) == ("a", "finished", 10, 1)
    assert record["started"] <= record["finished"] <= time.time()
    assert record["checkpoint"] == str(checkpoint_path(folder / "checkpoints", 10))
    assert record["metrics"].keys() == {"valid", "test"}
    assert record["metrics"]["test"]["click"] == pytest.approx(outcome.metrics["test"]["click"])
    assert record["intervals"]["test"]["click"]["auc"][0] < record["metrics"]["test"]["click"]["auc"]
    assert record["rows_per_second"] > 0
    assert record["step_breakdown"].keys() >= {"read", "copy", "forward", "backward", "optimizer"}
    assert record["peak_memory_bytes"] > 1e8
    kinds = [event["event"] for event in events]
    assert kinds[:2] == ["run_started", "plan"]
    assert kinds[-1] == "run_finished"
    assert all(event["time"] > 1e9 for event in events)
    slices = next(event for event in events if event["event"] == "evaluation")["slices"]
    assert set(slices["brand"]) == {str(brand) for brand in range(6)}
    assert json.loads(json.dumps(events[0]["config"])) == record["config"]
    for split, rows in (("valid", 300), ("test", 301)):
        table = pq.read_table(folder / "predictions" / f"{split}.parquet")
        assert table.num_rows == rows
        tasks = [f"{task}_{column}" for task in ("click", "spend") for column in ("label", "probability", "weight")]
        assert table.column_names == ["example_id", *tasks]


def spy_on_logs(monkeypatch, seen):
    opened = ParquetLog.__init__

    def record(self, path, *args, **kwargs):
        seen.append(("open", str(path)))
        opened(self, path, *args, **kwargs)

    monkeypatch.setattr(ParquetLog, "__init__", record)


def test_fitting_and_early_stopping_never_open_the_test_split(tiny_config, monkeypatch):
    seen = []
    spy_on_logs(monkeypatch, seen)
    options = ["train.epochs=20", "train.optimizers.sparse.lr=0.3", "train.early_stopping={patience: 1}"]
    prepared = prepare(tiny_config(*options, "train.calibration=platt"))
    fit(prepared, [lambda event: seen.append((event["event"], event.get("split")))])
    tests = [i for i, (kind, what) in enumerate(seen) if kind == "open" and "test" in Path(what).name]
    assert len(tests) == 1
    kinds = [kind for kind, _ in seen[: tests[0]]]
    assert {"step", "checkpoint", "evaluation"} <= set(kinds)
    assert [kind for kind, _ in seen[tests[0] :]] == ["open", "evaluation", "open", "embedding_health", "run_finished"]


def test_a_test_split_that_cannot_be_read_does_not_keep_a_run_from_training(data, tiny_config):
    (data / "test.parquet").write_bytes(b"poison")
    prepared = prepare(tiny_config(f"data.folder={data}", "run_id=a", "train.early_stopping={}"))
    with pytest.raises(UserError, match=r"test\.parquet: not a whole Parquet file"):
        fit(prepared, [])
    record = read_record(prepared.job.folder)
    assert record["status"] == "failed"
    assert "test.parquet: not a whole Parquet file" in record["message"]
    (data / "test.parquet").unlink()
    events = []
    outcome = fit(
        prepare(tiny_config(f"data.folder={data}", "run_id=a", "train.early_stopping={}", "resume=auto")),
        [events.append],
    )
    assert outcome.metrics.keys() == {"valid"}
    assert not [event for event in events if event["event"] == "step"]


def test_a_log_without_validation_and_test_trains_too(data, tiny_config):
    for split in ("valid", "test"):
        (data / f"{split}.parquet").unlink()
    outcome = fit(prepare(tiny_config(f"data.folder={data}")), [])
    assert (outcome.status, outcome.metrics) == ("finished", {})
    with pytest.raises(UserError, match=r"train\.calibration is fitted on a validation split"):
        prepare(tiny_config(f"data.folder={data}", "run_id=c", "train.calibration=platt"))
    with pytest.raises(UserError, match=r"train\.early_stopping needs a validation split"):
        prepare(tiny_config(f"data.folder={data}", "train.early_stopping={}"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.slices=[brnd]"], "brnd"),
        (["train.early_stopping={metric: rmse}"], "metric is 'rmse', which the binary task 'click' does not have"),
        (
            ["train.optimizers.sparse.name=adam"],
            "train.optimizers.sparse.name is 'adam', which fbgemm has on CUDA only",
        ),
        (
            ["train.optimizers.sparse.name=rowwise_adagrad", "train.sharding.sharding_types=[column_wise]"],
            "train.sharding.sharding_types leaves nothing for table 'brand': rowwise_adagrad",
        ),
        (["model.modules=[self_attention]", "+model.heads=3"], "heads"),
        (["trainer=ray", "trainer.workers=7"], "data.shards is 6, but there are 7 workers"),
        (["trainer=ray", "trainer.device=auto"], "trainer.device is 'auto', but the driver may have other devices"),
        (["trainer.device=cuda"], "trainer.device is 'cuda', and torch finds no GPU here"),
        (["train.sharding.ddr_bytes=1000"], "bytes are missing"),
        (
            ["train.optimizers.clip={model: 5.0, model.towrs: 1.0}"],
            "train.optimizers.clip names 'model.towrs', which no dense parameter has\n  hint: did you mean 'model.towers'?",
        ),
        (
            ["train.optimizers.clip={model.embeddings.bags: 1.0}"],
            "names 'model.embeddings.bags', which no dense parameter has",
        ),
        (["data.folder=/nowhere"], "/nowhere/schema.yaml: no such schema"),
        (["resume=/nowhere/step_00000001"], "resume is '/nowhere/step_00000001', and there is no such checkpoint"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(tiny_config, tmp_path, monkeypatch, overrides, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError) as caught:
        prepare(tiny_config(*overrides))
    assert message in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_run_id_is_used_once(train_tiny, tmp_path):
    folder, _, _ = train_tiny("run_id=a", "train.max_steps=1")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(
        UserError, match=r"run .*/runs/a exists already\n  hint: give it another run_id, or .* resume=auto"
    ):
        train_tiny("run_id=a", "train.max_steps=1")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    names = {train_tiny("train.max_steps=1")[0].name for _ in range(3)}
    assert len(names) == 3


def test_auto_takes_up_the_newest_unfinished_run_of_the_same_config(train_tiny, tiny_config):
    options = ["objective=faulty", "objective.fault=not_finite", "objective.step=7", "train.checkpoint.every_steps=2"]
    folders = []
    for name in ("first", "second"):
        with pytest.raises(UserError, match="not finite"):
            train_tiny(*options, f"run_id={name}")
        folders.append(prepare(tiny_config(*options, "resume=auto")).job.folder)
        os.utime(folders[-1] / "run.json", (time.time() - 100 + len(folders),) * 2)
    assert [folder.name for folder in folders] == ["first", "second"]
    assert prepare(tiny_config(*options, "resume=auto", "trainer=ray")).job.folder == folders[1]
    assert prepare(tiny_config(*options, "resume=auto", "seed=1")).job.folder not in folders
    assert prepare(tiny_config(*options)).job.folder not in folders
    started = read_record(folders[1])["started"]
    folder, outcome, events = train_tiny(*options, "resume=auto")
    assert (folder, outcome.step) == (folders[1], 10)  # the fault is in the seventh step of a process
    assert next(event["step"] for event in events if event["event"] == "resumed") == 6
    assert read_record(folder)["started"] == started
    assert prepare(tiny_config(*options, "resume=auto")).job.folder == folders[0]


def test_a_run_starts_from_the_checkpoint_of_another_with_its_vocabulary(train_tiny, tiny_config, data):
    origin, _, _ = train_tiny("run_id=a", f"data.folder={data}", "train.checkpoint={every_steps: 4, keep: 9}")
    train = pq.read_table(data / "train.parquet")
    users = pa.array([f"other {user}" for user in train["user"].to_pylist()])
    pq.write_table(train.set_column(train.column_names.index("user"), "user", users), data / "train.parquet")
    path = checkpoint_path(origin / "checkpoints", 4)
    prepared = prepare(tiny_config("run_id=b", f"data.folder={data}", f"resume={path}"))
    assert "u34" in prepared.job.transforms.vocabulary("user").to_pylist()
    events = []
    outcome = fit(prepared, [events.append])
    assert (prepared.job.folder.name, outcome.step) == ("b", 10)
    assert next(event for event in events if event["event"] == "resumed")["path"] == str(path)


def test_a_run_goes_on_with_its_own_config_only(train_tiny, tiny_config, tmp_path):
    folder, _, _ = train_tiny("run_id=a")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    checkpoint = checkpoint_path(folder / "checkpoints", 10)
    new = ["train.epochs=2", "train.optimizers.dense.lr=0.002", "train.slices=[brand]", "seed=1"]
    for overrides, changes in (
        (new[:1], "train.epochs 1 → 2"),
        (new, "train.epochs 1 → 2, train.slices [] → ['brand'], train.optimizers.dense.lr 0.001 → 0.002, 1 more"),
    ):
        with pytest.raises(UserError) as caught:
            prepare(tiny_config("run_id=a", "resume=auto", *overrides))
        assert caught.value.message == f"run {folder} has another config: {changes}"
        assert caught.value.hint == (
            f"give the old values, or start a new run with the new ones: another run_id and resume={checkpoint}"
        )
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert (
        prepare(tiny_config("run_id=a", "resume=auto", "trainer=ray", f"runs_folder={tmp_path}/runs/")).job.folder
        == folder
    )
    longer, outcome, events = train_tiny("run_id=b", f"resume={checkpoint}", *new[:3])  # what the hint says works
    assert (longer.name, outcome.step) == ("b", 20)
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(11, 21))


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), "interrupted"), (OSError("disk full"), "failed")])
def test_a_run_that_breaks_off_says_so(tiny_config, error, status):
    prepared, events = prepare(tiny_config()), []

    def listener(event):
        events.append(event)
        if event["event"] == "step":
            raise error

    with pytest.raises(type(error)):
        fit(prepared, [listener])
    assert read_record(prepared.job.folder)["status"] == status
    assert events[-1]["event"] == "run_finished"
    assert (events[-1]["status"], events[-1]["message"]) == (status, str(error) or type(error).__name__)
