"""The report of a run: one HTML file without scripts or links to elsewhere, also from a run that crashed half-way."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from raysys.report import figures, tables
from raysys.report.format import (
    ABSENT,
    METRICS,
    compact,
    count,
    duration,
    metric_title,
    moment,
    number,
    size,
    timestamp,
)
from raysys.report.markup import Markup, join, tag
from raysys.report.record import RunRecord, load_record

_HEADLINE_SPLITS = ("test", "valid", "train")
_WARNINGS_SHOWN = 10

_SECTIONS: tuple[tuple[str, Callable[[RunRecord], Markup | None]], ...] = (
    ("Metrics", tables.metrics),
    ("Distance to the Bayes optimum", tables.bayes),
    ("Curves", figures.curves),
    ("Calibration", figures.calibration),
    ("Calibration of what is ranked first", figures.selection),
    ("Slices", tables.slices),
    ("Speed", figures.throughput),
    ("Embeddings", lambda record: _together(tables.health(record), figures.norms(record))),
    ("Sharding plan", tables.plan),
    ("Checkpoints", tables.checkpoints),
    ("Config", tables.config),
    ("Environment", tables.facts),
)

_EXPECTED = ("Curves", "Calibration", "Speed", "Embeddings", "Sharding plan", "Config")
"""Sections that every complete run has: a report without one says so."""


def write_report(folder: str | Path) -> Path:
    """Write `report.html` into a run's folder and give its path; a reader never sees half a file."""
    path = Path(folder) / "report.html"
    content = render_report(load_record(folder))
    draft = path.with_name(".report.html.part")
    draft.write_bytes(content.encode("utf-8", "replace"))
    os.replace(draft, path)
    return path


def render_report(record: RunRecord) -> str:
    """The page as text."""
    sections = {title: build(record) for title, build in _SECTIONS}
    present = {title: content for title, content in sections.items() if content is not None}
    navigation = tag("nav", *(tag("a", title, href=f"#{_slug(title)}") for title in present))
    notes = [tag("p", note) for note in _notes(record, [title for title in _EXPECTED if title not in present])]
    body = tag(
        "main",
        _header(record),
        tag("div", *notes, class_="notes") if notes else None,
        _tiles(record),
        navigation,
        *(tag("section", tag("h2", title), content, id=_slug(title)) for title, content in present.items()),
        tag("footer", f"raysys {(record.run.get('versions') or {}).get('raysys', '')} · {record.folder.name}"),
    )
    style = resources.files("raysys.report").joinpath("report.css").read_text()
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        # The browser itself refuses anything that is not in this file.
        tag("meta", http_equiv="Content-Security-Policy", content="default-src 'none'; style-src 'unsafe-inline'"),
        tag("title", f"{record.run_id} · raysys"),
        tag("style", Markup(style)),
    )
    return "<!doctype html>\n" + tag("html", head, tag("body", body), lang="en") + "\n"


def _header(record: RunRecord) -> Markup:
    ranks = record.get("world_size")
    device = record.get("device")
    began = timestamp(record.run.get("started")) or record.first_time
    facts = [
        moment(began),
        None if _seconds(record) is None else duration(_seconds(record)),
        None if ranks is None else f"{ranks} {'rank' if ranks == 1 else 'ranks'}" + (f" on {device}" if device else ""),
        _progress(record),
        None if record.get("seed") is None else f"seed {record.get('seed')}",
    ]
    pill = tag("span", record.status.replace("_", " "), class_=f"status {record.status}")
    title = tag("h1", record.run_id, " ", pill)
    return tag("header", title, tag("p", " · ".join(fact for fact in facts if fact and fact != ABSENT)))


def _progress(record: RunRecord) -> str | None:
    if not record.steps:
        return None
    total = record.started.get("total_steps")
    return f"{count(record.steps[-1]['step'])}{f' of {count(total)}' if total else ''} steps"


def _seconds(record: RunRecord) -> float | None:
    if record.finished is not None:
        return record.finished.get("seconds")
    if record.first_time is None or record.last is None:
        return None
    return record.last["time"] - record.first_time


def _notes(record: RunRecord, missing: list[str]) -> list[str]:
    """What a reader must know before the figures: how the run ended, and what is not there."""
    notes = [_ending(record)]
    if not record.steps:
        notes.append("No training step was recorded.")
    if not record.metrics:
        notes.append("No split was evaluated yet: metrics are those of the training window.")
    if record.resumed:
        steps = ", ".join(count(event["step"]) for event in record.resumed)
        notes.append(
            f"Training was taken up from a checkpoint at step {steps}; steps that were repeated are shown once."
        )
    if not record.run:
        notes.append("run.json is not there: everything on this page comes from the run's events.")
    if record.damaged_lines:
        notes.append(f"{record.damaged_lines} torn line(s) in events.jsonl were skipped.")
    if missing:
        notes.append(f"Not recorded: {', '.join(title[0].lower() + title[1:] for title in missing)}.")
    notes += [f"Step {count(event.get('step'))}: {event['message']}" for event in record.warnings[-_WARNINGS_SHOWN:]]
    return [note for note in notes if note]


def _ending(record: RunRecord) -> str | None:
    message = (record.finished or {}).get("message") or record.run.get("message")
    when = moment((record.last or {}).get("time"))
    if record.status == "unfinished":
        return f"No end was recorded: the run was killed, or hangs. Last event at {when}."
    if record.status == "running":
        return f"The run was still going when this report was written. Last event at {when}."
    if message or record.status == "failed":
        return f"{record.status.replace('_', ' ').capitalize()}: {message or 'no reason was recorded'}"
    return None


def _tiles(record: RunRecord) -> Markup | None:
    """The headline: the quality of the first task on the most final split, and below it what it took."""
    rows = [row for row in (_quality_tiles(record), _cost_tiles(record)) if row]
    return join(tag("div", *row, class_="tiles") for row in rows) if rows else None


def _cost_tiles(record: RunRecord) -> list[Markup]:
    tiles = []
    peak, parameters = record.run.get("peak_memory_bytes"), record.get("parameters")
    rate = record.run.get("rows_per_second")
    if rate is None and record.steps:
        rate = record.steps[-1].get("rows_per_second")
    if rate is not None:
        tiles.append(_tile("Rows a second", compact(rate), "all ranks"))
    if parameters:
        note = f"{compact(parameters.get('sparse'))} sparse, {compact(parameters.get('dense'))} dense"
        tiles.append(_tile("Parameters", compact(sum(parameters.values())), note))
    flops = record.get("flops_per_row")
    if flops is not None:
        tiles.append(_tile("FLOPs a row", compact(flops), "forward"))
    if peak is not None:
        tiles.append(_tile("Peak memory", size(peak), "largest rank"))
    return tiles


def _quality_tiles(record: RunRecord) -> list[Markup]:
    if not record.tasks:
        return []
    task = record.tasks[0]
    split = next((split for split in _HEADLINE_SPLITS if task in record.metrics.get(split, {})), None)
    if split is None:
        window: dict[str, Any] = next(
            (event["metrics"] for event in reversed(record.steps) if event.get("metrics")), {}
        )
        values, where = window.get(task) or {}, "train window"
    else:
        values, where = record.metrics[split][task], split
    tiles = []
    for metric in [metric for metric in METRICS if metric in values][:4]:
        bounds = None if split is None else tables.interval(record, split, task, metric)
        note = f"{task}, 95%: {number(bounds[0])} … {number(bounds[1])}" if bounds else task
        tiles.append(_tile(f"{metric_title(metric)} · {where}", number(values[metric]), note, main=True))
    optimum = ((record.run.get("bayes") or {}).get(split) or {}).get(task, {}).get("ne")
    if optimum is not None and values.get("ne") is not None:
        distance, note = f"{values['ne'] - optimum:+.4f}", f"{task}, Bayes NE {number(optimum)}"
        tiles.append(_tile(f"NE above Bayes · {where}", distance, note, main=True))
    return tiles


def _tile(title: str, value: str, note: str, main: bool = False) -> Markup:
    parts = (tag("span", title), tag("strong", value), tag("small", note))
    return tag("div", *parts, class_="tile main" if main else "tile")


def _together(*parts: Markup | None) -> Markup | None:
    return join(parts) if any(part is not None for part in parts) else None


def _slug(title: str) -> str:
    return title.lower().replace(" ", "-")
