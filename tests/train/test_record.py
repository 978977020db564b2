"""`run.json` is true at every moment, and its hash says which runs are the same experiment."""

from __future__ import annotations

import json

from raysys.train.record import RunRecord, config_hash, read_record
from raysys.train.trainer import prepare


def test_the_hash_is_of_what_decides_the_result(tiny_config):
    config = tiny_config()
    same = [
        tiny_config("run_id=other"),
        tiny_config("resume=auto"),
        tiny_config("trainer=ray"),
        config | {"debug": True, "dry_run": False, "runs_folder": "elsewhere"},
    ]
    assert {config_hash(other) for other in same} == {config_hash(config)}
    for other in (tiny_config("seed=1"), tiny_config("train.batch_size=100"), tiny_config("model.layers=2")):
        assert config_hash(other) != config_hash(config)


def test_every_change_is_on_disk_as_strict_json(tiny_config):
    job = prepare(tiny_config("run_id=a")).job
    assert read_record(job.folder) is None
    job.folder.mkdir(parents=True)
    record = RunRecord(job, world_size=1)
    content = read_record(job.folder)
    assert {key: content[key] for key in ("run_id", "status", "finished", "world_size", "seed")} == {
        "run_id": "a",
        "status": "running",
        "finished": None,
        "world_size": 1,
        "seed": 0,
    }
    assert content["config"] == job.config
    assert content["schema_hash"] == job.schema.fingerprint()
    assert content["versions"].keys() == {"python", "torch", "torchrec", "ray", "pyarrow", "numpy"}
    record.update(status="finished", metrics={"test": {"click": {"ne": float("nan")}}}, paths={"bundle": job.folder})
    text = (job.folder / "run.json").read_text()
    assert json.loads(text)["metrics"] == {"test": {"click": {"ne": None}}}
    assert "NaN" not in text
    again = RunRecord(job)
    assert (again.content["status"], again.content["started"]) == ("running", content["started"])
