from __future__ import annotations

import json

import pytest
from rich.console import Console

from raysys.errors import UserError
from raysys.report.runs import list_runs, runs_json, runs_table


@pytest.fixture
def folder(make_run, events, record):
    """Four runs: finished, crashed without run.json, failed, and one with a damaged run.json."""
    make_run("finished", events, record)
    late = [{**event, "time": event["time"] + 1000} for event in events[:9]]
    crashed = make_run("crashed", late)
    failed = {
        **record,
        "run_id": "failed-one",
        "status": "failed",
        "started": 1_700_000_500,
        "finished": 1_700_000_520,
        "metrics": {},
    }
    make_run("failed", [], failed)
    (make_run("damaged", []) / "run.json").write_text('{"run_id"')
    (crashed.parent / "not-a-run").mkdir()
    (crashed.parent / "notes.txt").write_text("")
    return crashed.parent


def test_newest_first_with_what_is_known(folder):
    runs = list_runs(folder)
    assert [(run.run_id, run.status) for run in runs] == [
        ("dhen-movielens", "unfinished"), ("failed-one", "failed"), ("dhen-movielens", "finished"), ("damaged", "unreadable"),
    ]  # fmt: skip
    crashed, failed, finished, damaged = runs
    assert crashed.model == finished.model == "DHEN"
    assert crashed.parameters == 268_705
    assert crashed.headline is None
    assert crashed.seconds == pytest.approx(17)  # step 70 was its last sign of life
    assert failed.seconds == 20
    assert finished.headline[:2] == ("test", "like")
    assert damaged.folder == str(folder / "damaged")


def test_json_is_strict_and_complete(folder, record):
    runs = json.loads(runs_json(list_runs(folder)))
    assert runs[2]["metrics"] == record["metrics"]
    assert runs[2]["folder"] == str(folder / "finished")
    assert runs[3]["started"] is None


def test_the_table_shows_headline_metrics(folder):
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(runs_table(list_runs(folder)))
    lines = console.export_text().splitlines()
    assert lines[0].split() == ["run", "status", "started", "took", "model", "parameters", "rows/s", "on", "NE", "AUC"]
    assert lines[3].split()[:2] == ["dhen-movielens", "finished"]
    assert lines[3].split()[-6:] == ["269k", "10.2k", "test", "like", "0.7963", "0.7892"]
    assert lines[1].split()[-3:] == ["–", "–", "–"]  # noqa: RUF001


def test_an_empty_folder_has_no_runs_and_a_missing_one_is_named(tmp_path):
    assert list_runs(tmp_path) == []
    assert runs_json([]) == "[]"
    with pytest.raises(UserError, match="nowhere: no such folder"):
        list_runs(tmp_path / "nowhere")
