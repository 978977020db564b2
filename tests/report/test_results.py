from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from raysys.report.results import Run, chosen_trial, read_runs, selected, write_page


def run(model, trial, seed, ne, difference=None, **content):
    metrics = {"auc": 1 - ne / 4, "ne": ne, "gauc": None}
    versus = {} if difference is None else {"click": {"ne": [difference, difference - 0.01, difference + 0.01]}}
    return Run(
        comparison="interactions",
        set="made",
        task="click",
        model=model,
        baseline="dcnv2",
        trial=trial,
        seed=seed,
        overrides=[],
        commit="abc",
        steps=5,
        seconds=1.0,
        rows_per_second=12_300.0,
        parameters={"dense": 1500, "sparse": 10},
        flops_per_row=2000,
        metrics={"valid": {"click": metrics}, "test": {"click": metrics}},
        versus=versus,
        **content,
    )


RUNS = [
    run("dcnv2", 0, 0, 0.90, bayes={"click": 0.70}),
    run("dcnv2", 1, 0, 0.95),
    run("dcnv2", 0, 1, 0.92),
    run("dhen", 0, 0, 0.85, -0.05),
    run("dhen", 1, 0, 0.80, -0.10),
    run("dhen", 1, 1, 0.82, -0.10),
    run("dlrm", 0, 0, 0.905, 0.005),
]


@pytest.fixture
def page(tmp_path):
    records = tmp_path / "records"
    records.mkdir()
    (records / "interactions-made.jsonl").write_text("".join(json.dumps(asdict(one)) + "\n" for one in RUNS))
    page = tmp_path / "results.md"
    page.write_text("# Results\n\nBy hand.\n\n## Comparison\n\nof last time\n")
    write_page(page, records)
    return page


def test_the_trial_with_the_best_validation_ne_is_chosen():
    assert chosen_trial(RUNS, "dhen") == 1
    assert {model: [one.seed for one in own] for model, own in selected(RUNS).items()} == {
        "dcnv2": [0, 1],
        "dhen": [0, 1],
        "dlrm": [0],
    }


def test_records_come_back_as_they_were_written(page):
    assert read_runs(page.parent / "records" / "interactions-made.jsonl") == RUNS
    assert read_runs(page.parent / "none.jsonl") == []


def test_the_table_has_means_deviations_and_differences(page):
    text = page.read_text()
    rows = {
        line.split("`")[1]: [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text.splitlines()
        if line[:3] == "| `"
    }
    assert rows["dcnv2"] == ["0.7725 ± 0.0035", "0.9100 ± 0.0141", "–", "1.50k", "2.00k", "12.3k", "", "", "0%"]  # noqa: RUF001
    assert rows["dhen"][1] == "0.8100 ± 0.0141"
    assert rows["dhen"][-2] == "**-0.1000 (-0.1100 … -0.0900)**"
    assert rows["dhen"][-1] == "48%"  # 1 - (0.81 - 0.70) / (0.91 - 0.70)
    assert rows["dlrm"][-2] == "+0.0050 (-0.0050 … +0.0150)"


def test_only_the_part_below_the_heading_is_written_anew(page):
    text = page.read_text()
    assert text.startswith("# Results\n\nBy hand.\n\n## Comparison\n")
    assert "of last time" not in text
    plot = page.parent / "records" / "interactions-made.svg"
    assert "(records/interactions-made.svg)" in text
    first = plot.read_bytes()
    write_page(page, page.parent / "records")
    assert (page.read_text(), plot.read_bytes()) == (text, first)
