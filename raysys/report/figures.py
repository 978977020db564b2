"""The parts of the report that are drawn: curves over steps, calibration, throughput and the time of a step."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

from raysys.report.events import Event
from raysys.report.format import METRICS, SPLITS, compact, count, duration, in_order, metric_title, number, share
from raysys.report.markup import Markup, join, table, tag
from raysys.report.plots import Series, calibration_chart, line_chart, smooth, stacked_bar
from raysys.report.record import RunRecord

DRAWN_TASKS = 8
"""Tasks beyond these have their figures in the table of metrics only, so that a report of hundreds stays readable."""

_DRAWN_TABLES = 8
_SMOOTHED_FROM = 200
_STEP_PARTS = ("read", "copy", "forward", "backward", "optimizer", "other")
_DIRECTION = {"lower": "lower is better", "higher": "higher is better", "target": "best at 1"}


def figure(title: str, chart: Markup, series: list[Series], note: str | None = None, text: Callable = number) -> Markup:
    """A chart under its title, with a legend that gives the last value of each curve."""
    legend = []
    for one in series:
        known = [y for y in one.y if y is not None]
        value = tag("b", text(known[-1])) if known else None
        legend.append(tag("span", tag("i", class_=one.role), f"{one.name} ", value))
    caption = tag("figcaption", tag("h3", title), tag("div", *legend, class_="legend") if series else None)
    return tag("figure", caption, chart, tag("p", note, class_="note") if note else None)


def curves(record: RunRecord) -> Markup | None:
    """Loss, its parts, each task's metrics and the learning rates over steps."""
    figures = [_loss(record), _loss_parts(record)]
    for task in record.tasks[:DRAWN_TASKS]:
        figures += [_metric(record, task, metric) for metric in METRICS if metric not in ("log_loss", "ece")]
    figures.append(_learning_rates(record))
    drawn = [one for one in figures if one is not None]
    left_out = len(record.tasks) - DRAWN_TASKS
    note = tag("p", f"{left_out} more tasks are in the table only", class_="note") if left_out > 0 else None
    return join([note, tag("div", *drawn, class_="grid")]) if drawn else None


def calibration(record: RunRecord) -> Markup | None:
    """For each task the newest calibration curve of every split that was evaluated."""
    newest = {event["split"]: event for event in record.evaluations if event.get("calibration_curve")}
    figures = []
    for task in record.tasks[:DRAWN_TASKS]:
        found = {split: newest[split]["calibration_curve"].get(task) for split in in_order(list(newest), SPLITS)}
        known = {split: [point for point in curve if _known(point)] for split, curve in found.items() if curve}
        known = {split: points for split, points in known.items() if points}
        if known:
            legend = [Series(split, [], [], split) for split in known]
            figures.append(figure(task, calibration_chart(known), legend))
    return tag("div", *figures, class_="grid three") if figures else None


def selection(record: RunRecord) -> Markup | None:
    """Of tasks with a teacher, on the most final split: is the model right on what it ranks first within a request?"""
    splits = {event["split"]: event["selection"] for event in record.evaluations if event.get("selection")}
    split = next((split for split in reversed(SPLITS) if split in splits), None)
    if split is None:
        return None
    figures = [
        _selection(task, split, splits[split][task]) for task in record.tasks[:DRAWN_TASKS] if task in splits[split]
    ]
    return tag("div", *figures, class_="grid")


def _selection(task: str, split: str, parts: dict[str, list[dict[str, Any]]]) -> Markup:
    ratios = {
        part: [one["predicted"] / one["reference"] if one["reference"] > 0 else None for one in depths]
        for part, depths in parts.items()
    }
    names = {"labels": "rows with a label, to the label", "teacher": "other rows, to the teacher"}
    place = [float(i) for i in range(len(parts["labels"]))]
    series = [Series(name, place, ratios[part], f"c{i}", dots=True) for i, (part, name) in enumerate(names.items())]
    series = [one for one in series if any(y is not None for y in one.y)]
    title = f"Predicted over true · {task} · {split}"
    if not series:
        return figure(title, Markup(""), [], "no positive label, and no teacher on rows without a label")
    depths = ["all" if one["depth"] is None else str(one["depth"]) for one in parts["labels"]]
    x_label = "candidates of each request that the model ranks first"
    chart = line_chart(series, x_label, "predicted over true", level=1.0, categories=depths)
    cells: list[list[object]] = [
        [depth, count(labels["rows"]), number(labels["reference"], 0), number(ratios["labels"][i], 3),
         count(teacher["rows"]), number(ratios["teacher"][i], 3)]
        for i, (depth, labels, teacher) in enumerate(zip(depths, parts["labels"], parts["teacher"], strict=True))
    ]  # fmt: skip
    head = ["first", "labelled", "positives", "ratio", "others", "ratio"]
    note = "above 1: too much is promised. Places are among all candidates of a request, with a label or without."
    return figure(title, join([chart, tag("p", note, class_="note"), table(head, cells)]), series)


def throughput(record: RunRecord) -> Markup | None:
    """Rows per second over steps, and where the time of a step goes."""
    drawn = []
    rates = [event.get("rows_per_second") for event in record.steps]
    known = [rate for rate in rates if rate is not None]
    if known:
        series = [Series("rows/s", _steps(record.steps), rates, "train")]
        chart = line_chart(series, "step", "rows per second", y_from=0.0)
        note = f"median {compact(statistics.median(known))} rows/s over all workers, of {len(known)} measurements"
        drawn.append(figure("Throughput", chart, series, note, text=compact))
    parts = step_parts(record)
    total = sum(parts.values())
    if total > 0:
        rows: list[list[object]] = [
            [tag("span", tag("i", class_=f"c{i % 8}"), name, class_="legend"), duration(value), share(value / total)]
            for i, (name, value) in enumerate(parts.items())
        ]
        rows.append([tag("b", "step"), tag("b", duration(total)), ""])
        content = (stacked_bar(parts, duration), table(["part", "time a step", "share"], rows))
        drawn.append(tag("figure", tag("figcaption", tag("h3", "Where the time of a step goes")), *content))
    return tag("div", *drawn, class_="grid") if drawn else None


def norms(record: RunRecord) -> Markup | None:
    """The mean norm of the rows of the largest tables over steps, where it was measured more than once."""
    if len(record.health) < 2:
        return None
    largest = sorted(record.health[-1]["tables"].items(), key=lambda item: -item[1]["rows"])[:_DRAWN_TABLES]
    series = []
    for i, (name, _) in enumerate(largest):
        y = [event["tables"].get(name, {}).get("norm_mean") for event in record.health]
        series.append(Series(name, _steps(record.health), y, f"c{i}", dots=len(y) < 40))
    if all(y is None for one in series for y in one.y):
        return None
    left_out = len(record.health[-1]["tables"]) - len(series)
    note = f"the {len(series)} largest tables; {left_out} more in the table" if left_out else None
    chart = line_chart(series, "step", "mean norm of a row", y_from=0.0)
    return figure("Norm of the embeddings", chart, series, note)


def step_parts(record: RunRecord) -> dict[str, float]:
    """Seconds of each part of a step: run.json's figures, else the mean over the steps after the first."""
    parts = record.run.get("step_breakdown")
    if not parts:
        measured = [event["breakdown"] for event in record.steps if event.get("breakdown")]
        measured = measured[1:] or measured  # the first one warms up
        names = dict.fromkeys(name for one in measured for name in one)
        parts = {name: statistics.fmean(one.get(name) or 0.0 for one in measured) for name in names}
    return {name: parts[name] or 0.0 for name in in_order(list(parts), _STEP_PARTS)}


def _loss(record: RunRecord) -> Markup | None:
    values = [event.get("loss") for event in record.steps]
    if all(value is None for value in values):
        return None
    series = _smoothed(Series("train", _steps(record.steps), values, "train"))
    chart = line_chart(series, "step", "loss", marks=_marks(record))
    bare = [event["step"] for event in record.steps if event.get("loss") is None]
    missing = f"not a number at {len(bare)} steps, first at step {count(bare[0])}" if bare else None
    epochs = "vertical lines: epochs" if any(label == "" for _, label in _marks(record)) else None
    return figure("Loss", chart, series[-1:], _note("lower is better", series, epochs, missing))


def _loss_parts(record: RunRecord) -> Markup | None:
    names = list(dict.fromkeys(name for event in record.steps for name in event.get("parts") or {}))[:8]
    if len(names) < 2:
        return None
    series = []
    for i, name in enumerate(names):
        y = [(event.get("parts") or {}).get(name) for event in record.steps]
        series.append(Series(name, _steps(record.steps), y, f"c{i}"))
    if all(y is None for one in series for y in one.y):
        return None
    lines = [line for one in series for line in _smoothed(one)]
    return figure("Loss by part", line_chart(lines, "step", "loss"), series, _note(None, lines))


def _metric(record: RunRecord, task: str, metric: str) -> Markup | None:
    window = [((event.get("metrics") or {}).get(task) or {}).get(metric) for event in record.steps]
    series = [Series("train (window)", _steps(record.steps), window, "train")]
    for split in in_order(list(dict.fromkeys(event["split"] for event in record.evaluations)), SPLITS):
        of_split = (event for event in record.evaluations if event["split"] == split)
        events = sorted(of_split, key=lambda event: event["step"])  # the best weights are evaluated again at the end
        y = [(event["tasks"].get(task) or {}).get(metric) for event in events]
        series.append(Series(split, _steps(events), y, split, dots=True))
    series = [one for one in series if any(y is not None for y in one.y)]
    if not series:
        return None
    optimum = bayes(record, task, metric)
    level = 1.0 if metric == "calibration" else optimum
    lines = [line for one in series for line in (_smoothed(one) if one.role == "train" else [one])]
    chart = line_chart(lines, "step", metric_title(metric), level=level, marks=_marks(record))
    note = _note(_DIRECTION[METRICS[metric].better], lines, "dashed: Bayes optimum" if optimum is not None else None)
    return figure(f"{metric_title(metric)} · {task}", chart, series, note)


def bayes(record: RunRecord, task: str, metric: str) -> float | None:
    """The metric of the true probabilities on the most final split for which run.json has it (synthetic data only)."""
    splits = record.run.get("bayes") or {}
    for split in ("test", "valid", "train"):
        value = (splits.get(split) or {}).get(task, {}).get(metric)
        if value is not None:
            return value
    return None


def _learning_rates(record: RunRecord) -> Markup | None:
    names = list(dict.fromkeys(name for event in record.steps for name in event.get("learning_rates") or {}))[:8]
    if not names:
        return None
    series = []
    for i, name in enumerate(names):
        y = [(event.get("learning_rates") or {}).get(name) for event in record.steps]
        series.append(Series(name, _steps(record.steps), y, f"c{i}"))
    chart = line_chart(series, "step", "learning rate", y_from=0.0)
    return figure("Learning rates", chart, series, text=lambda value: f"{value:.3g}")


def _smoothed(series: Series) -> list[Series]:
    """A long curve as a faint one under its moving mean; a short one as it is."""
    if len(series.y) < _SMOOTHED_FROM:
        return [series]
    faint = Series(series.name, series.x, series.y, series.role, faint=True)
    return [faint, smooth(series, len(series.y) // 40)]


def _note(direction: str | None, series: list[Series], *more: str | None) -> str | None:
    smoothed = next((f"line: mean over {len(one.y) // 40} records" for one in series if one.faint), None)
    return "; ".join(part for part in (direction, smoothed, *more) if part) or None


def _marks(record: RunRecord) -> list[tuple[float, str]]:
    """Where each epoch begins, for a few, and the step whose weights were kept."""
    starts: dict[int | None, float] = {}
    for event in record.steps:
        starts.setdefault(event.get("epoch"), event["step"])
    marks = [(step, "") for step in list(starts.values())[1:]] if len(starts) <= 12 else []
    best = (record.run.get("best") or {}).get("step")
    return marks if best is None else [*marks, (best, "best")]


def _steps(events: list[Event]) -> list[float]:
    return [event["step"] for event in events]


def _known(point: dict[str, Any]) -> bool:
    values = [point.get(key) for key in ("prediction", "label", "weight")]
    return all(value is not None and math.isfinite(value) for value in values)
