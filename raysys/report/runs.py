"""The runs of a folder: a table for people, JSON for programs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from raysys.errors import UserError
from raysys.report.events import EventTail, last_event
from raysys.report.format import ABSENT, compact, duration, metric_title, moment, number, timestamp
from raysys.report.record import read_run_json, run_status
from raysys.strict_json import to_plain

_SHOWN_SPLITS = ("test", "valid", "train")
_STATUS_STYLES = {
    "finished": "green",
    "early_stopped": "green",
    "running": "blue",
    "failed": "red",
    "unreadable": "red",
}


@dataclass(frozen=True)
class RunSummary:
    """One run in a list. `started` is unix seconds, `seconds` how long it went (or has gone so far).

    `metrics` is {split: {task: {metric: value}}}; a run that did not come to writing run.json has none.
    """

    run_id: str
    folder: str
    status: str
    started: float | None = None
    seconds: float | None = None
    model: str | None = None
    parameters: int | None = None
    rows_per_second: float | None = None
    metrics: dict[str, dict[str, dict[str, float | None]]] = field(default_factory=dict)

    @property
    def headline(self) -> tuple[str, str, dict[str, float | None]] | None:
        """(split, task, metrics) of the first task on the most final split that was evaluated."""
        for split in _SHOWN_SPLITS:
            for task, values in (self.metrics.get(split) or {}).items():
                return split, task, values
        return None


def list_runs(folder: str | Path) -> list[RunSummary]:
    """The runs in the sub-folders of `folder`, newest first. Sub-folders that hold no run are passed over."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder", "runs are written to ./runs unless a config says otherwise")
    found = [path for path in folder.iterdir() if (path / "run.json").exists() or (path / "events.jsonl").exists()]
    return sorted((_summary(path) for path in found), key=lambda run: (-(run.started or 0.0), run.folder))


def runs_json(runs: list[RunSummary]) -> str:
    """A JSON array of the summaries."""
    return json.dumps(to_plain([asdict(run) for run in runs]), indent=2, allow_nan=False, ensure_ascii=False)


def runs_table(runs: list[RunSummary]) -> Table:
    """A table for the terminal, with each run's headline metrics."""
    metrics = [m for m in ("ne", "auc", "rmse") if any(run.headline and m in run.headline[2] for run in runs)]
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for title in (
        "run",
        "status",
        "started",
        "took",
        "model",
        "parameters",
        "rows/s",
        "on",
        *map(metric_title, metrics),
    ):
        table.add_column(title, justify="left" if title in ("run", "status", "started", "model", "on") else "right")
    for run in runs:
        split, task, values = run.headline or ("", "", {})
        table.add_row(
            Text(run.run_id, overflow="fold"),
            Text(run.status.replace("_", " "), style=_STATUS_STYLES.get(run.status, "yellow")),
            moment(run.started),
            duration(run.seconds),
            Text(run.model or ABSENT),
            compact(run.parameters),
            compact(run.rows_per_second),
            Text(f"{split} {task}".strip()),
            *(number(values.get(metric)) for metric in metrics),
        )
    return table


def _summary(folder: Path) -> RunSummary:
    try:
        run = read_run_json(folder)
    except UserError:  # one damaged record must not hide the other runs
        return RunSummary(folder.name, str(folder), "unreadable")
    last = last_event(folder / "events.jsonl")
    first = next(EventTail(folder / "events.jsonl").poll(), {})
    known = {**first, **run}
    started = timestamp(run.get("started")) or first.get("time")
    ended = timestamp(run.get("finished")) or (last or {}).get("time")
    parameters = known.get("parameters")
    return RunSummary(
        run_id=str(known.get("run_id") or folder.name),
        folder=str(folder),
        status=run_status(run, last),
        started=started,
        seconds=None if started is None or ended is None else ended - started,
        model=_model(known.get("config") or {}),
        parameters=sum(parameters.values()) if parameters else None,
        rows_per_second=known.get("rows_per_second"),
        metrics=run.get("metrics") or {},
    )


def _model(config: dict[str, Any]) -> str | None:
    """The class name of the model, from its `_target_`."""
    model = config.get("model")
    target = model.get("_target_") if isinstance(model, dict) else None
    return None if target is None else str(target).rsplit(".", 1)[-1]
