from __future__ import annotations

import time

import pytest

from raysys.errors import UserError
from raysys.report.record import load_record, run_status


def test_steps_after_a_restart_replace_those_they_repeat(make_run, events):
    steps = [event for event in events if event["event"] == "step"]
    begin = [events[0], *steps[:12]]  # to step 120
    again = [{"event": "resumed", "time": 1.7e9, "step": 80, "path": "checkpoints/step_00000080"}]
    again += [{**event, "loss": 99.0} for event in steps[8:10]]  # 90 and 100
    record = load_record(make_run("restarted", begin + again))
    assert [event["step"] for event in record.steps] == list(range(10, 101, 10))
    assert [event["loss"] for event in record.steps[-3:]] == [steps[7]["loss"], 99.0, 99.0]
    assert [event["step"] for event in record.resumed] == [80]


def test_a_repeated_evaluation_counts_once_and_run_json_comes_first(make_run, events, record):
    evaluation = next(event for event in events if event["event"] == "evaluation")
    changed = {**evaluation, "tasks": {"like": {"ne": 0.5}}}
    folder = make_run("evaluated", [evaluation, changed])
    assert load_record(folder).metrics == {"valid": {"like": {"ne": 0.5}}}
    folder = make_run("recorded", [evaluation], {"metrics": {"test": record["metrics"]["test"]}})
    assert list(load_record(folder).metrics) == ["valid", "test"]
    assert load_record(folder).tasks == ["like", "finish"]


def test_status_of_runs_that_did_not_say_how_they_ended():
    step = {"event": "step", "time": 1000.0}
    assert run_status({"status": "running"}, step) == "unfinished"
    assert run_status({}, {**step, "time": time.time()}) == "running"
    assert run_status({}, {"event": "run_finished", "time": 1, "status": "failed"}) == "failed"
    assert run_status({"status": "finished", "finished": 1001.0}, step) == "finished"
    # run.json is from before the run was continued
    assert run_status({"status": "finished", "finished": 10.0}, step) == "unfinished"
    assert run_status({"status": "finished", "finished": "1970-01-01T00:00:10Z"}, step) == "unfinished"


def test_a_folder_without_a_run_and_a_broken_record_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no run: it has neither run\.json nor events\.jsonl"):
        load_record(tmp_path)
    (tmp_path / "run.json").write_text('{"run_id": ')
    with pytest.raises(UserError, match=r"run\.json: not valid JSON"):
        load_record(tmp_path)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(UserError, match=r"run\.json: expected an object, found list"):
        load_record(tmp_path)
