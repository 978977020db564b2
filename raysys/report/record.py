"""One run as its folder tells it: `run.json` where the run came that far, and what its events add up to."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raysys.errors import UserError
from raysys.report.events import Event, EventTail
from raysys.report.format import SPLITS, in_order, timestamp

FINAL = ("finished", "early_stopped", "failed", "interrupted")

_SILENCE_SECONDS = 300
"""A run without an end whose last event is older than this no longer counts as running."""


@dataclass
class RunRecord:
    """What is known of a run; everything may be missing but the folder.

    `run` is run.json; `started` the newest run_started event; steps, evaluations and health hold what counts after
    restarts: where a run went back to a checkpoint, the events that it then repeated replace the first ones.
    """

    folder: Path
    run: dict[str, Any] = field(default_factory=dict)
    started: Event = field(default_factory=dict)
    first_time: float | None = None
    last: Event | None = None
    plan: list[dict[str, Any]] = field(default_factory=list)
    steps: list[Event] = field(default_factory=list)
    evaluations: list[Event] = field(default_factory=list)
    checkpoints: list[Event] = field(default_factory=list)
    health: list[Event] = field(default_factory=list)
    resumed: list[Event] = field(default_factory=list)
    warnings: list[Event] = field(default_factory=list)
    finished: Event | None = None
    damaged_lines: int = 0

    @property
    def run_id(self) -> str:
        """The name under which the run started; the folder's name where nothing says it."""
        return str(self.run.get("run_id") or self.started.get("run_id") or self.folder.name)

    @property
    def status(self) -> str:
        """One of `FINAL`, or `running`, or `unfinished` (silent for minutes without an end: it was probably killed)."""
        return run_status(self.run, self.finished or self.last)

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config."""
        return self.run.get("config") or self.started.get("config") or {}

    @property
    def metrics(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """{split: {task: {metric: value}}}: run.json's, and for a split that it lacks the newest evaluation's."""
        found = {event["split"]: event["tasks"] for event in self.evaluations} | (self.run.get("metrics") or {})
        return {split: found[split] for split in in_order(list(found), SPLITS) if found[split]}

    @property
    def tasks(self) -> list[str]:
        """The tasks in the order of the schema, and any that only metrics name."""
        named = [task for tasks in self.metrics.values() for task in tasks]
        named += [task for event in self.steps[-1:] for task in event.get("metrics") or {}]
        return in_order(list(dict.fromkeys(named)), tuple(self.started.get("tasks") or ()))

    def get(self, key: str) -> Any:
        """A fact that run.json has at the end and run_started at the beginning, such as `world_size`."""
        value = self.run.get(key)
        return self.started.get(key) if value is None else value

    def add(self, event: Event) -> None:
        """Take in the next event."""
        kind = event["event"]
        self.first_time = event["time"] if self.first_time is None else self.first_time
        self.last = event
        if kind == "run_started":
            self.started, self.finished = event, None
        elif kind == "plan":
            self.plan = event["tables"]
        elif kind == "step":
            if self.steps and event["step"] <= self.steps[-1]["step"]:
                self._forget(event["step"])
            self.steps.append(event)
        elif kind == "evaluation":
            same = (event["split"], event["step"])
            self.evaluations = [old for old in self.evaluations if (old["split"], old["step"]) != same] + [event]
        elif kind == "run_finished":
            self.finished = event
        elif kind in self._lists:
            self._lists[kind].append(event)

    @property
    def _lists(self) -> dict[str, list[Event]]:
        return {
            "checkpoint": self.checkpoints,
            "embedding_health": self.health,
            "resumed": self.resumed,
            "warning": self.warnings,
        }

    def _forget(self, step: int) -> None:
        for events in (self.steps, self.evaluations, self.health):
            events[:] = [event for event in events if event["step"] < step]


def load_record(folder: str | Path) -> RunRecord:
    """Read a run's folder; a folder with neither run.json nor events is a `UserError`."""
    folder = Path(folder)
    tail = EventTail(folder / "events.jsonl")
    record = RunRecord(folder, read_run_json(folder))
    for event in tail.poll():
        record.add(event)
    record.damaged_lines = tail.damaged
    if not record.run and record.last is None:
        raise UserError(f"{folder}: no run: it has neither run.json nor events.jsonl", "list runs with: raysys runs")
    return record


def read_run_json(folder: Path) -> dict[str, Any]:
    """The content of run.json, {} where a run did not come that far."""
    try:
        content = json.loads((folder / "run.json").read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        hint = "the run's events are still readable: move the file away"
        raise UserError(f"{folder / 'run.json'}: not valid JSON: {error}", hint) from None
    if not isinstance(content, dict):
        raise UserError(f"{folder / 'run.json'}: expected an object, found {type(content).__name__}")
    return content


def run_status(run: dict[str, Any], last: Event | None) -> str:
    """The status of a run from its run.json and its last event.

    run.json may be older than the events (a finished run that is continued), or say `running` after a kill.
    """
    if last is not None and last["event"] == "run_finished":
        return last["status"]
    if run.get("status") in FINAL:
        ended = timestamp(run.get("finished"))
        if last is None or last["event"] == "evaluation" or (ended is not None and ended >= last["time"] - 60):
            return run["status"]
    return "running" if last is not None and time.time() - last["time"] < _SILENCE_SECONDS else "unfinished"
