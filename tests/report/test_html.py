from __future__ import annotations

import html
import re
from html.parser import HTMLParser

import pytest

from raysys.report.html import write_report
from raysys.report.markup import _WITHOUT_END

ALL_SECTIONS = [
    "Metrics",
    "Curves",
    "Calibration",
    "Slices",
    "Speed",
    "Embeddings",
    "Sharding plan",
    "Checkpoints",
    "Config",
    "Environment",
]


class Outline(HTMLParser):
    """Tags must be closed in order; collects headings, text and attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.stack, self.headings, self.text, self.attributes, self.tags = [], [], "", [], set()
        self.feed(page)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in _WITHOUT_END:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack[-1:] == ["h2"]:
            self.headings.append(data)
        if "style" not in self.stack:
            self.text += data + " "


def report(folder) -> tuple[str, Outline]:
    page = write_report(folder).read_text()
    return page, Outline(page)


def test_a_complete_run_has_every_section_and_its_figures(run):
    page, outline = report(run)
    assert outline.headings == ALL_SECTIONS
    for figure in (
        "0.7963",
        "0.7892",
        "95%: 0.7891 … 0.8032",
        "10.2k",
        "269k",
        "869.8 MiB",
        "1.25M",
        "Film-Noir",
        "14.3%",
        "Star Wars (1977)",
        "column_wise",
    ):
        assert figure in outline.text, figure
    for figure in (
        "105.2 KiB",
        "164.2 KiB",
        "33.0%",
        "31 ms",
        "row_wise_adagrad",
        "2.13.0+cpu",
        "step_00000600",
        "0f3a9c1e77aa2b10",
        "600 of 600 steps",
    ):
        assert figure in outline.text, figure
    for title in (
        "Loss by part",
        "NE · like",
        "AUC · finish",
        "GAUC · like",
        "Learning rates",
        "Norm of the embeddings",
    ):
        assert title in outline.text, title
    assert "notes" not in dict(outline.attributes).values()
    assert len(page) < 150_000


def test_the_file_needs_nothing_from_elsewhere(run):
    page, outline = report(run)
    assert not outline.tags & {"script", "link", "img", "iframe", "object", "embed", "base"}
    assert all(value.startswith("#") for name, value in outline.attributes if name in ("href", "src", "xlink:href"))
    assert not any(name.startswith("on") for name, _ in outline.attributes)
    assert not re.search(r"https?://|url\(|@import", page)
    assert "default-src 'none'" in html.unescape(page)
    assert "prefers-color-scheme: dark" in page


def test_navigation_leads_to_sections(run):
    _, outline = report(run)
    targets = {value[1:] for name, value in outline.attributes if name == "href"}
    assert targets == {value for name, value in outline.attributes if name == "id"}


def test_names_from_data_and_config_are_escaped(make_run, events, record):
    hostile = "<script>alert(1)</script>\"'&\ud800"
    for event in events:
        if event["event"] == "evaluation":
            event["slices"] = {hostile: {hostile: event["slices"]["genre"]["Drama"]}}
        if event["event"] == "embedding_health":
            event["tables"] = {
                hostile: {**event["tables"]["item_id"], "hot_ids": [{"id": 1, "value": hostile, "share": 0.1}]}
            }
        if event["event"] == "plan":
            event["tables"][0]["table"] = hostile
    record |= {"run_id": hostile, "config": {hostile: {hostile: hostile}}, "versions": {hostile: hostile}}
    _, outline = report(make_run("hostile", events, record))
    assert "script" not in outline.tags
    assert "<script>alert(1)</script>" in outline.text


def test_a_crashed_run_says_so_and_shows_what_there_is(make_run, events):
    folder = make_run("crashed", [event for event in events[:9] if event["event"] != "plan"])
    with open(folder / "events.jsonl", "a") as file:
        file.write('{"event": "st')
    _, outline = report(folder)
    assert outline.headings == ["Curves", "Speed", "Config", "Environment"]
    for note in (
        "No end was recorded: the run was killed, or hangs. Last event at 2023-11-14 22:13 UTC.",
        "No split was evaluated yet: metrics are those of the training window.",
        "run.json is not there",
        "Not recorded: calibration, embeddings, sharding plan.",
        "NE · train window",
    ):
        assert note in outline.text, note


def test_a_failed_run_gives_its_reason(make_run, events):
    end = {
        "event": "run_finished",
        "time": 1.7e9,
        "status": "failed",
        "step": 0,
        "seconds": 3.0,
        "message": "step 7: like is not finite",
    }
    warning = {"event": "warning", "time": 1.7e9, "step": 3, "message": "checkpoint step_00000002 is damaged"}
    _, outline = report(make_run("failed", [*events[:2], warning, end]))
    for note in (
        "Failed: step 7: like is not finite",
        "No training step was recorded.",
        "Step 3: checkpoint step_00000002 is damaged",
    ):
        assert note in outline.text, note
    assert "Sharding plan" in outline.headings


@pytest.mark.parametrize("cut", range(0, 12))
def test_any_beginning_of_a_run_gives_a_report(make_run, events, cut):
    _, outline = report(
        make_run(
            "cut", [event for event in events if event["event"] != "step"][:cut] + events[2 : 2 + cut], {"run_id": "x"}
        )
    )
    assert "unfinished" in outline.text


def test_steps_without_figures_do_not_break_charts(make_run, events):
    bare = [{"event": "step", "time": 1.7e9 + i, "step": i, "epoch": 0, "rows": i, "loss": None, "parts": {"a": None, "b": None},
             "metrics": {"like": {"ne": None}}, "rows_per_second": None, "breakdown": {}, "learning_rates": {}} for i in range(3)]  # fmt: skip
    _, outline = report(make_run("bare", [events[0], *bare]))
    assert "Curves" not in outline.headings
    bare[1]["loss"] = 0.5
    _, outline = report(make_run("one", [events[0], *bare]))
    assert "not a number at 2 steps, first at step 0" in outline.text


def test_a_restart_is_told(make_run, events):
    steps = [event for event in events if event["event"] == "step"]
    resumed = {"event": "resumed", "time": 1.7e9, "step": 40, "path": "x"}
    _, outline = report(make_run("restarted", [*events[:2], *steps[:6], resumed, *steps[4:8]]))
    assert "taken up from a checkpoint at step 40" in outline.text


def test_the_distance_to_the_bayes_optimum(make_run, events, record):
    record["bayes"] = {"test": {"like": {"ne": 0.78, "auc": 0.8}}}
    _, outline = report(make_run("synthetic", events, record))
    assert "Distance to the Bayes optimum" in outline.headings
    ne = record["metrics"]["test"]["like"]["ne"]
    assert f"{ne - 0.78:+.4f}" in outline.text
    assert f"{(1 - ne) / 0.22:.1%}" in outline.text
    assert "dashed: Bayes optimum" in outline.text


def test_a_long_run_of_many_tasks_stays_small(make_run, events, record):
    step = events[2]
    tasks = {f"task_{i}": {"ne": 0.8, "auc": 0.7, "gauc": 0.7, "calibration": 1.0} for i in range(30)}
    steps = [{**step, "step": i, "loss": i % 7 / 7, "metrics": tasks} for i in range(1, 2501)]
    evaluation = next(event for event in events if event["event"] == "evaluation")
    slices = {
        f"column_{c}": {f"value {i}": {task: {"ne": 0.8, "rows": i} for task in tasks} for i in range(100)}
        for c in range(3)
    }
    record["metrics"] = {"test": tasks}
    folder = make_run(
        "long", [events[0], *steps, {**evaluation, "step": 2500, "tasks": tasks, "slices": slices}], record
    )
    page, outline = report(folder)
    assert len(page.encode()) < 1_500_000
    assert "75 less frequent values are left out" in outline.text


def test_writing_again_replaces_the_report_and_leaves_nothing_else(run):
    before = {path.name for path in run.iterdir()}
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert {path.name for path in run.iterdir()} - before == {"report.html"}


def test_calibration_of_what_is_ranked_first_is_drawn_for_tasks_with_a_teacher(make_run, events, record):
    def depths(*ratios):
        rows = zip((1, 5, None), (50.0, 200.0, 900.0), ratios, strict=True)
        return [{"depth": k, "rows": n, "predicted": n * ratio / 10, "reference": n / 10} for k, n, ratio in rows]

    none = [one | {"predicted": 0.0, "reference": 0.0, "rows": 0.0} for one in depths(1, 1, 1)]
    events[-2]["selection"] = {"like": {"labels": depths(0.97, 0.98, 0.99), "teacher": depths(1.8125, 1.25, 1.0)}}
    assert events[-2]["split"] == "test"
    page = report(make_run("a", events, record))[0]
    section = page[page.index('id="calibration-of-what-is-ranked-first"') :].split("</section>")[0]
    assert section.count("<figure>") == 1
    for text in ("Predicted over true · like · test", "1.812", "1.250", ">200<", ">90<", ">all<"):
        assert text in section, text
    assert section.count("<circle") == 6
    events[-2]["selection"]["like"]["teacher"] = none
    assert "other rows, to the teacher" not in report(make_run("b", events, record))[0]
    events[-2]["selection"]["like"]["labels"] = none
    assert "no positive label, and no teacher" in report(make_run("c", events, record))[0]
    del events[-2]["selection"]
    assert "ranked first" not in report(make_run("d", events, record))[0]
