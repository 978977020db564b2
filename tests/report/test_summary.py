"""What a training job says at its end."""

from __future__ import annotations

import pytest
from rich.console import Console

from raysys.report.summary import print_summary


@pytest.fixture
def summary():
    """`summary(folder, record)`: the text of the summary."""

    def text(folder, record):
        console = Console(width=100)
        with console.capture() as capture:
            print_summary(
                folder, {"step": 1200, "checkpoint": folder / "none", "metrics": {}} | record, folder, console
            )
        return capture.get()

    return text


def test_a_retrieval_run_is_not_scored_row_by_row(summary, tmp_path):
    metrics = {"test": {"next": {"recall@10": 0.07, "ndcg@10": 0.04, "rows": 20}}}
    config = {"train": {"retrieval": {"exclude": "seen"}}}
    text = summary(tmp_path / "a", {"status": "finished", "metrics": metrics, "config": config})
    assert "jobs/predict.py" not in text
    assert "test next 0.0700 0.0400 20" in "\n".join(" ".join(line.split()) for line in text.splitlines())


def test_a_finished_run_shows_its_metrics_and_how_to_score(summary, tmp_path):
    metrics = {"test": {"click": {"auc": 0.75, "ne": 0.9, "log_loss": 0.5, "rows": 2000}, "spend": {"rmse": 1.25}}}
    text = summary(tmp_path / "a", {"status": "finished", "metrics": metrics})
    assert "a finished at step 1,200" in text
    for line in ("split task AUC NE Log loss RMSE rows", "test click 0.7500 0.9000 0.5000 2,000", "test spend 1.2500"):
        assert line in "\n".join(" ".join(line.split()) for line in text.splitlines())
    assert f"python jobs/predict.py run={tmp_path}/a input=LOG.parquet output=scores" in text
    assert "resume=auto" not in text


def test_an_interrupted_run_says_how_it_goes_on_instead(summary, tmp_path):
    text = summary(tmp_path / "a", {"status": "interrupted"})
    assert "a interrupted at step 1,200" in text
    assert "python jobs/train.py … run_id=a resume=auto" in text
    assert "AUC" not in text
    assert "predict" not in text


def test_the_folder_of_runs_is_named_where_it_is_not_the_default_one(summary, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = [
        [line.strip() for line in summary(folder, {"status": "finished"}).splitlines() if "raysys runs" in line]
        for folder in (tmp_path / "runs" / "a", tmp_path / "elsewhere" / "a")
    ]
    assert commands == [["raysys runs"], [f"raysys runs {tmp_path}/elsewhere"]]
