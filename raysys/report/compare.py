"""Two runs side by side: what was configured differently, and whether their metrics differ by more than chance.

The intervals come from the predictions that both runs saved of the same examples, row by row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from raysys.errors import UserError
from raysys.plain import ConfigDifference, config_differences, config_value
from raysys.report.format import ABSENT, METRICS, SPLITS, count, in_order, metric_title, number
from raysys.report.record import RunRecord, load_record
from raysys.strict_json import to_plain

_WITH_INTERVAL = ("ne", "auc", "log_loss")

PairedInterval = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, str], tuple[float, float, float]]
"""`raysys.train.intervals.paired_interval`: (labels, weights, p_a, p_b, metric) to (metric(p_b) - metric(p_a), low, high)."""


@dataclass(frozen=True)
class MetricDifference:
    """A metric of both runs. `difference` is b - a; low and high are None where there is no interval."""

    split: str
    task: str
    metric: str
    a: float | None
    b: float | None
    difference: float | None
    low: float | None = None
    high: float | None = None

    @property
    def verdict(self) -> str:
        """`better`, `worse` (of b against a) or `same` where the interval holds 0; empty without an interval or a direction."""
        better = METRICS[self.metric].better if self.metric in METRICS else "target"
        if self.low is None or self.high is None or better == "target":
            return ""
        if self.low <= 0 <= self.high:
            return "same"
        return "better" if (self.high < 0) == (better == "lower") else "worse"


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; `notes` say why an interval is missing."""

    a: str
    b: str
    config: list[ConfigDifference]
    metrics: list[MetricDifference]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        content = to_plain(asdict(self))
        for row, difference in zip(content["metrics"], self.metrics, strict=True):
            row["verdict"] = difference.verdict
        return content


@dataclass(frozen=True)
class _Pairs:
    """Rows that both runs predicted: labels, weights and probabilities [N], float64."""

    labels: np.ndarray
    weights: np.ndarray
    p_a: np.ndarray
    p_b: np.ndarray


def compare(run_a: str | Path, run_b: str | Path, paired_interval: PairedInterval) -> Comparison:
    """Compare two runs' folders. Runs evaluated on other examples or labels are compared without intervals, with a note."""
    a, b = load_record(run_a), load_record(run_b)
    notes: list[str] = []
    rows: list[MetricDifference] = []
    for split in in_order([split for split in a.metrics if split in b.metrics], SPLITS):
        predictions = _read_pair(a, b, split, notes)
        for task in [task for task in a.metrics[split] if task in b.metrics[split]]:
            pairs = None if predictions is None else _join(*predictions, split, task, notes)
            rows += _differences(a, b, split, task, pairs, paired_interval)
    if not rows:
        notes.append("no split was evaluated in both runs")
    return Comparison(a.run_id, b.run_id, config_differences(a.config, b.config), rows, notes)


def render_comparison(comparison: Comparison) -> RenderableType:
    """Tables for the terminal: config, then metrics with intervals, then notes."""
    same_name = comparison.a == comparison.b
    a, b = (f"A: {comparison.a}", f"B: {comparison.b}") if same_name else (comparison.a, comparison.b)
    parts: list[RenderableType] = []
    if comparison.config:
        table = _table("config", a, b)
        for one in comparison.config:
            table.add_row(Text(one.key), Text(config_value(one.a)), Text(config_value(one.b)))
        parts.append(table)
    else:
        parts.append(Text("the configs are the same"))
    if comparison.metrics:
        parts += [Text(), _metrics_table(comparison.metrics, a, b)]
    parts += [Text(f"note: {note}", style="yellow") for note in comparison.notes]
    return Group(*parts)


def _metrics_table(metrics: list[MetricDifference], a: str, b: str) -> Table:
    table = _table("split", "task", "metric", a, b, "difference", "95% interval", "")
    for column in table.columns[3:7]:
        column.justify = "right"
    for row in metrics:
        difference = ABSENT if row.difference is None else f"{row.difference:+.5f}"
        interval = "" if row.low is None else f"{row.low:+.5f} … {row.high:+.5f}"
        style = {"better": "green", "worse": "red"}.get(row.verdict, "")
        names = (Text(row.split), Text(row.task), Text(metric_title(row.metric)))
        table.add_row(*names, number(row.a, 5), number(row.b, 5), difference, interval, Text(row.verdict, style=style))
    return table


def _table(*titles: str) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 3, 0, 0))
    for title in titles:
        table.add_column(Text(title), overflow="fold")
    return table


def _differences(
    a: RunRecord, b: RunRecord, split: str, task: str, pairs: _Pairs | None, paired_interval: PairedInterval
) -> list[MetricDifference]:
    values_a, values_b = a.metrics[split][task], b.metrics[split][task]
    keys = [key for key in METRICS if key in values_a and key in values_b]
    rows = []
    for key in keys:
        left, right = values_a[key], values_b[key]
        difference = None if left is None or right is None else right - left
        low = high = None
        if pairs is not None and key in _WITH_INTERVAL and difference is not None:
            found = paired_interval(pairs.labels, pairs.weights, pairs.p_a, pairs.p_b, key)
            if np.isfinite(found).all():  # NaN: undefined on the rows that both have
                difference, low, high = (float(value) for value in found)
        rows.append(MetricDifference(split, task, key, left, right, difference, low, high))
    return rows


_Columns = dict[str, np.ndarray]


def _read_pair(a: RunRecord, b: RunRecord, split: str, notes: list[str]) -> tuple[_Columns, _Columns] | None:
    """The predictions of both runs for the examples that both have, in one order; None, with a note, where one has none."""
    files = [record.folder / "predictions" / f"{split}.parquet" for record in (a, b)]
    missing = [str(file) for file in files if not file.exists()]
    if missing:
        notes.append(f"{split}: no intervals: {' and '.join(missing)} not there")
        return None
    left, right = (_read(file) for file in files)
    ids = (left["example_id"], right["example_id"])
    shared, in_left, in_right = np.intersect1d(*ids, assume_unique=True, return_indices=True)
    most = max(map(len, ids))
    if len(shared) == 0:
        notes.append(f"{split}: no intervals: the runs predicted different examples")
        return None
    if len(shared) < most:
        both = f"the {count(len(shared))} examples that both runs predicted, of {count(most)}"
        notes.append(f"{split}: differences with an interval are over {both}")
    return {k: v[in_left] for k, v in left.items()}, {k: v[in_right] for k, v in right.items()}


def _read(file: Path) -> _Columns:
    table = pq.read_table(file)
    if "example_id" not in table.column_names:
        raise UserError(f"{file}: no column 'example_id'", f"it has: {', '.join(table.column_names)}")
    columns = {name: table[name].to_numpy() for name in table.column_names}
    ids = columns["example_id"]
    if len(np.unique(ids)) != len(ids):
        hint = "predictions are joined by it: it must be unique in the log"
        raise UserError(f"{file}: column 'example_id' has repeated values", hint)
    return columns


def _join(a: _Columns, b: _Columns, split: str, task: str, notes: list[str]) -> _Pairs | None:
    """The labelled rows of a task; None, with a note, where the runs do not both have it or do not agree on its labels."""
    names = [f"{task}_{part}" for part in ("label", "weight", "probability")]
    if any(name not in columns for name in names for columns in (a, b)):
        notes.append(f"{split}: no intervals for {task}: it is not in the predictions of both runs")
        return None
    labels, weights, p_a = (np.asarray(a[name], np.float64) for name in names)
    other_labels, other_weights, p_b = (np.asarray(b[name], np.float64) for name in names)
    known = weights > 0  # rows without a label have weight 0
    for name, differ in (("weights", weights != other_weights), ("labels", labels[known] != other_labels[known])):
        if differ.any():
            rows = f"{count(int(differ.sum()))} of the same examples"
            notes.append(f"{split}: no intervals for {task}: the runs have other {name} for {rows}")
            return None
    return _Pairs(labels[known], weights[known], p_a[known], p_b[known])
