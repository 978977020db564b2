"""The job as a user starts it: one command trains, every mistake ends in one line, every end can be gone on from."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysys.bundle import load_bundle, verify_bundle
from raysys.report.events import read_events
from raysys.train.checkpoint import checkpoint_path, list_checkpoints
from raysys.train.record import read_record

ROOT = Path(__file__).parents[2]


@pytest.fixture
def job(monkeypatch, capsys, tmp_path):
    """`job("train", "model=dlrm")` runs a job in this process: exit status, stdout and stderr."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        status = 0
        try:
            runpy.run_path(str(ROOT / "jobs" / f"{name}.py"), run_name="__main__")
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def tiny(tiny_configs, tmp_path):
    """The arguments that make a short run of the tiny data set in `tmp_path/runs`."""
    groups = ["data=tiny", "model=tiny", f"runs_folder={tmp_path}/runs", "train.batch_size=150", "train.log_every=1"]
    return ["--config-dir", tiny_configs, *groups]


def test_one_command_trains_exports_and_reports(job, tiny, tmp_path):
    status, out, _ = job("train", *tiny, "run_id=a", "train.calibration=isotonic")
    assert status == 0
    folder = tmp_path / "runs" / "a"
    for name in ("run.json", "events.jsonl", "schema.yaml", "transforms/transforms.json", "report.html"):
        assert (folder / name).stat().st_size > 0
    assert list((folder / "tensorboard").glob("events.*"))
    verify_bundle(folder / "bundle")
    record = read_record(folder)
    assert [event["event"] for event in read_events(folder / "events.jsonl")][-1] == "run_finished"
    metrics = record["metrics"]["test"]["click"]
    for text in (f"{metrics['auc']:.4f}", f"{metrics['ne']:.4f}", str(folder / "bundle"), "python jobs/predict.py"):
        assert text in out


def test_a_dry_run_tells_the_cost_and_writes_nothing(job, tiny, tiny_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tiny_data.rglob("*")}
    status, out, _ = job("train", *tiny, "--dry-run", "trainer=ray", "train.epochs=3")
    assert status == 0
    for text in (
        "table_wise",
        "bytes per worker",
        "FLOPs per row",
        "rows per epoch",
        "1,500",
        "steps",
        "30",
        "time, at least",
    ):
        assert text in out
    assert "dry run: nothing was trained" in out
    assert list(tmp_path.iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in tiny_data.rglob("*")} == before
    status, _, err = job("train", "--dry-run", "data=synthetic", "model=dlrm", f"data.folder={tmp_path}/new")
    assert (status, err.splitlines()[0]) == (2, f"error: {tmp_path}/new: no data yet, and a dry run writes none")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_the_data_may_be_at_a_uri(job, tiny, tiny_data, tmp_path, protocol):
    """`memory` stands for what only fsspec opens."""
    data = f"{protocol}://{tmp_path}/clicks"
    filesystem, root = fsspec.core.url_to_fs(data)
    filesystem.put(f"{tiny_data}/", root, recursive=True)
    facts = {"arguments": {}, "bayes": {"test": {"click": {"auc": 0.9}}}}
    filesystem.pipe_file(f"{root}/prepared.json", json.dumps(facts).encode())
    status, _, err = job("train", *tiny, f"data.folder={data}", "run_id=a", "train.calibration=platt")
    assert status == 0, err
    record = read_record(tmp_path / "runs" / "a")
    assert record["metrics"].keys() == {"valid", "test"}
    assert record["bayes"] == facts["bayes"]


@pytest.mark.parametrize("name", ["synthetic", "table"])
def test_no_data_set_is_written_at_a_uri(job, tmp_path, name):
    data = f"memory://{tmp_path}/new"
    status, _, err = job("train", f"data={name}", "model=dlrm", f"runs_folder={tmp_path}/runs", f"data.folder={data}")
    assert (status, err) == (
        2,
        f"error: {data}: no prepared data set is there, and preparation writes local folders only\n"
        "  hint: prepare a local folder and copy it there\n",
    )
    assert not (tmp_path / "runs").exists()


def test_a_submitted_job_warns_of_relative_folders_before_it_trains(job, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    _, out, _ = job("train", *tiny, "runs_folder=runs", "--dry-run")
    assert out.startswith("warning: runs_folder=runs will be in Ray's temporary copy of the working directory")
    assert "warning" not in job("train", *tiny, "--dry-run")[1]


MISTAKES = {
    "unknown key": (
        ["train.batch_sise=3"],
        "unknown config key 'train.batch_sise'",
        "did you mean 'train.batch_size'?",
    ),
    "unknown key of a mapping": (
        ["train.optimizers.sparse={nme: sgd}"],
        "unknown config key 'train.optimizers.sparse.nme'",
        "did you mean 'name'?",
    ),
    "unknown option": (["model=tniy"], "no config 'tniy' in group 'model'", "did you mean 'tiny'?"),
    "missing value": (["data.folder=???"], "config key 'data.folder' has no default", "give it: data.folder=..."),
    "unknown argument": (
        ["+model.layres=2"],
        "raysys.models.ranking.dhen.DHEN has no argument 'layres'",
        "did you mean 'layers'?",
    ),
    "optimiser of CUDA": (
        ["trainer.device=cpu", "train.optimizers.sparse.name=adam"],
        "train.optimizers.sparse.name is 'adam', which fbgemm has on CUDA only",
        "on a CPU: sgd, adagrad, rowwise_adagrad",
    ),
    "optimiser and sharding": (
        [
            "train.optimizers.sparse.name=rowwise_adagrad",
            "train.sharding.tables={item: {sharding_types: [column_wise]}}",
        ],
        "train.sharding.tables.item.sharding_types has 'column_wise': rowwise_adagrad",
        "take row_wise or table_wise, or train.optimizers.sparse.name=adagrad",
    ),
    "heads": (["model.modules=[self_attention]", "+model.heads=3"], "heads", "heads can be 1, 2, 4, 8, 16"),
    "no data": (
        ["data.folder=/nowhere"],
        "/nowhere/schema.yaml: no such schema",
        "make a first one with: raysys schema",
    ),
    "no checkpoint": (["resume=/nowhere"], "resume is '/nowhere', and there is no such checkpoint", "auto, none or"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line_and_a_hint(job, tiny, tmp_path, mistake):
    overrides, message, hint = MISTAKES[mistake]
    status, out, err = job("train", *tiny, *overrides)
    assert (status, out) == (2, "")
    first, *rest = err.splitlines()
    assert first.startswith("error: ")
    assert message in first
    assert len(rest) == 1
    assert rest[0].startswith("  hint: ")
    assert hint in rest[0]
    assert not (tmp_path / "runs").exists()
    assert "Traceback (most recent call last)" in job("train", *tiny, *overrides, "--debug")[2]


def spoil_train(data):
    (data / "train.parquet").write_bytes((data / "train.parquet").read_bytes()[:-100])


def empty_train(data):
    (data / "train.parquet").write_bytes(b"")


def change(split, column, values):
    def spoil(data):
        table = pq.read_table(data / f"{split}.parquet")
        array = table[column].to_numpy().copy()
        array[list(values)] = list(values.values())
        table = table.set_column(table.column_names.index(column), column, pa.array(array))
        pq.write_table(table, data / f"{split}.parquet", row_group_size=400)

    return spoil


BAD_DATA = {
    "cut short": (spoil_train, "train.parquet: not a whole Parquet file"),
    "empty": (empty_train, "train.parquet: the file is empty (0 bytes)"),
    "NaN": (
        change("train", "price", {1300: float("nan")}),
        "train.parquet, row group 3, row 1300: dense column 'price' holds nan",
    ),
    "label": (change("train", "click", {700: 2}), "train.parquet, row group 1, row 700: "),
    "index": (change("train", "item", {5: 40}), "train.parquet, row group 0, row 5: column 'item'"),
    "late": (change("valid", "click", {299: -1}), "valid.parquet, row group 0, row 299: "),
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_bad_data_ends_in_one_line_with_file_and_row_group(job, tiny, tiny_data, tmp_path, kind):
    spoil, message = BAD_DATA[kind]
    data = shutil.copytree(tiny_data, tmp_path / "data")
    spoil(data)
    status, _, err = job("train", *tiny, f"data.folder={data}", "run_id=a", "train.checkpoint.every_steps=3")
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {data}/{message}")
    assert "Traceback" not in err
    folder = tmp_path / "runs" / "a"
    if folder.exists():
        assert read_record(folder)["status"] == "failed"
        assert (folder / "report.html").exists()
    if kind == "late":  # what was trained before is there, and serves once the data is mended
        shutil.copy(tiny_data / "valid.parquet", data / "valid.parquet")
        assert len(list_checkpoints(folder / "checkpoints")) == 2
        status, *_ = job("train", *tiny, f"data.folder={data}", "train.checkpoint.every_steps=3", "resume=auto")
        assert (status, read_record(folder)["status"]) == (0, "finished")


def start(*arguments, **environment):
    """A job in a process of its own."""
    path = os.pathsep.join([str(ROOT), *(str(entry) for entry in environment.pop("packages", ()))])
    command = [sys.executable, "-W", "ignore", ROOT / "jobs" / "train.py", *arguments]
    return subprocess.Popen(
        list(map(str, command)),
        cwd=environment.pop("cwd", ROOT),
        env=os.environ | {"PYTHONPATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(process, folder, step):
    """Until the run has reported a step; it is held in the next one, which gives the test its time."""
    while not any(
        event.get("step", 0) >= step for event in read_events(folder / "events.jsonl") if event["event"] == "step"
    ):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)


def wait_for_stop_file(folder):
    """Until SIGTERM has arrived, and the file that it leaves will be seen: it is looked for twice a second."""
    deadline = time.monotonic() + 60
    while not (folder / "stop").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.6)


HELD = ["objective=faulty", "objective.fault=hold", "objective.step=6", "train.checkpoint={every_steps: 4, keep: 9}"]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_a_run_that_is_ended_goes_on_to_the_same_weights(job, tiny, tiny_package, tensors_of, tmp_path, how):
    arguments = [*tiny, *HELD, f"objective.marker={tmp_path}/go"]
    process = start(*arguments, "run_id=a", packages=[tiny_package])
    folder = tmp_path / "runs" / "a"
    wait_for_step(process, folder, 5)
    process.send_signal(how)
    if how == signal.SIGTERM:
        wait_for_stop_file(folder)
        (tmp_path / "go").touch()
    out, _ = process.communicate(timeout=180)
    record = read_record(folder)
    if how == signal.SIGTERM:
        assert (process.returncode, record["status"], record["step"]) == (0, "interrupted", 7), out
        assert [path.name for path in list_checkpoints(folder / "checkpoints")] == ["step_00000004", "step_00000007"]
        assert not (folder / "bundle").exists()
        assert (folder / "report.html").exists()
    else:
        assert (process.returncode, record["status"]) == (-signal.SIGKILL, "running")
    (tmp_path / "go").touch()
    status, *_ = job("train", *arguments, "resume=auto")
    assert (status, read_record(folder)["status"], read_record(folder)["step"]) == (0, "finished", 10)
    verify_bundle(folder / "bundle")
    job("train", *arguments, "run_id=undisturbed")
    found, expected = (
        tensors_of(checkpoint_path(tmp_path / "runs" / name / "checkpoints", 10)) for name in ("a", "undisturbed")
    )
    assert found == expected


@pytest.fixture
def on_ray(ray_cluster):
    """The arguments that make a run join the tests' Ray."""
    import ray

    return ["trainer=ray", f"trainer.address={ray.get_runtime_context().gcs_address}"]


def test_a_users_model_trains_on_ray_until_sigterm_and_goes_on(on_ray, job, tiny, tiny_package, tiny_data, tmp_path):
    arguments = [*tiny, *HELD, *on_ray, "model=user", f"objective.marker={tmp_path}/go"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    arguments[arguments.index(f"runs_folder={tmp_path}/runs")] = (
        "runs_folder=../runs"  # relative to where the driver is
    )
    process = start(*arguments, "run_id=a", packages=[tiny_package], cwd=elsewhere)
    folder = tmp_path / "runs" / "a"
    wait_for_step(process, folder, 5)
    process.send_signal(signal.SIGTERM)
    wait_for_stop_file(folder)
    (tmp_path / "go").touch()
    out, _ = process.communicate(timeout=180)
    record = read_record(folder)
    assert (process.returncode, record["status"], record["world_size"]) == (0, "interrupted", 2), out
    assert record["step"] == 7
    assert "Traceback" not in out
    arguments = [f"runs_folder={tmp_path}/runs" if text == "runs_folder=../runs" else text for text in arguments]
    status, *_ = job("train", *arguments, "resume=auto")
    assert (status, read_record(folder)["status"], read_record(folder)["step"]) == (0, "finished", 10)
    resumed = [event["step"] for event in read_events(folder / "events.jsonl") if event["event"] == "resumed"]
    assert resumed == [7]
    bundle = load_bundle(folder / "bundle", allowed=("tinypkg.",))
    table = pq.read_table(folder / "predictions" / "test.parquet").sort_by("example_id")
    found = bundle.predict(pq.read_table(tiny_data / "test.parquet"))
    np.testing.assert_allclose(found[:, 0], table["click_probability"].to_numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.soak
def test_a_driver_on_ray_that_is_killed_goes_on(on_ray, job, tiny, tiny_package, tensors_of, tmp_path):
    arguments = [*tiny, *HELD, *on_ray, f"objective.marker={tmp_path}/go"]
    process = start(*arguments, "run_id=a", packages=[tiny_package])
    folder = tmp_path / "runs" / "a"
    wait_for_step(process, folder, 5)
    process.kill()
    process.communicate()
    (tmp_path / "go").touch()
    status, *_ = job("train", *arguments, "resume=auto")
    assert (status, read_record(folder)["status"]) == (0, "finished")
    job("train", *arguments, "run_id=undisturbed")
    found, expected = (
        tensors_of(checkpoint_path(tmp_path / "runs" / name / "checkpoints", 10)) for name in ("a", "undisturbed")
    )
    assert found == expected


def test_runs_are_scored_and_exported(job, tiny_run, tiny_data, tmp_path):
    status, out, _ = job("export", f"run={tiny_run}", f"output={tmp_path}/bundle")
    assert (status, out) == (0, f"bundle: {tmp_path}/bundle\n")
    assert verify_bundle(tmp_path / "bundle") == verify_bundle(tiny_run / "bundle")
    arguments = [f"run={tiny_run}", f"input={tiny_data}/test.parquet", f"output={tmp_path}/scores"]
    status, out, _ = job("predict", *arguments)
    assert (status, out) == (0, f"301 rows scored: {tmp_path}/scores\n")
    status, _, err = job("predict", *arguments)
    assert (status, err) == (
        2,
        f"error: {tmp_path}/scores is there already\n  hint: name a folder that does not exist\n",
    )
    status, _, err = job("predict", *arguments[1:])
    assert (status, err) == (2, "error: config key 'run' has no default\n  hint: give it: run=...\n")


def test_a_csv_file_is_trained_on_and_scored_as_it_is(job, tmp_path):
    rng = np.random.default_rng(0)
    shop = rng.integers(0, 30, 1000)
    rows = [f"{number % 7},{number:02d}x,{number / 3:.2f},{number % 2}" for number in shop]
    rows[5] = ",03x,,1"  # nulls
    source, later = tmp_path / "clicks.csv", tmp_path / "later.csv"
    source.write_text("\n".join(["day,shop,price,click", *rows]) + "\n")
    (tmp_path / "schema.yaml").write_text(
        """
tables: {day: {num_embeddings: 10}, shop: {num_embeddings: 40}}
dense: [{name: price}]
sparse: [{name: day, table: day}, {name: shop, table: shop}]
labels: [{name: click}]
"""
    )
    data = [
        f"data.prepare.{key}={tmp_path / file}" for key, file in (("source", "clicks.csv"), ("schema", "schema.yaml"))
    ]
    places = [f"data.folder={tmp_path}/data", f"runs_folder={tmp_path}/runs", "run_id=csv"]
    status, _, err = job("train", "data=table", "model=dlrm", "train.batch_size=200", *data, *places)
    assert status == 0, err
    run = tmp_path / "runs" / "csv"
    status, out, err = job("predict", f"run={run}", f"input={source}", f"output={tmp_path}/scores")
    assert (status, out) == (0, f"1,000 rows scored: {tmp_path}/scores\n"), err
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("scores")) == ["scores"]
    found = pq.read_table(tmp_path / "scores").sort_by("example_id")
    assert found["example_id"].to_pylist() == list(range(1000))  # the row's number
    expected = pq.read_table(run / "predictions" / "test.parquet")
    scores = found["click_probability"].to_numpy()[expected["example_id"].to_numpy()]
    np.testing.assert_allclose(scores, expected["click_probability"].to_numpy(), rtol=1e-6)

    later.write_text("shop,day,price\n12,3,1\n07,3,2\n")  # shops that look like numbers
    assert job("predict", f"run={run}", f"input={later}", f"output={tmp_path}/later")[0] == 0
    later.write_text("shop,dai,price\n12,3,1\n")
    status, _, err = job("predict", f"run={run}", f"input={later}", f"output={tmp_path}/wrong")
    assert (status, err.splitlines()[1]) == (2, "  hint: did you mean 'dai'?")
    assert err.startswith(f"error: {later}: column 'day' is missing (a sparse feature")
    later.write_text("shop,day,price\n")
    status, _, err = job("predict", f"run={run}", f"input={later}", f"output={tmp_path}/none")
    assert status == 2
    assert f"{later}: no rows" in err
    assert not list(tmp_path.glob("*.writing"))


def test_data_sets_are_prepared_once(job, tmp_path):
    arguments = [
        "data=criteo_shaped",
        f"data.folder={tmp_path}/data",
        "data.prepare.rows=1200",
        "data.prepare.processes=1",
    ]
    for words in ("prepared (999 train, 100 valid, 101 test rows)", "already prepared"):
        status, out, _ = job("prepare", *arguments)
        assert (status, out) == (0, f"{tmp_path}/data: {words}\n")
    assert json.loads((tmp_path / "data" / "prepared.json").read_text())["arguments"]["rows"] == 1200
    status, _, err = job("prepare", *arguments, "data.prepare.rows=2400")
    assert status == 2
    assert "was prepared with rows = 1200, not 2400" in err
