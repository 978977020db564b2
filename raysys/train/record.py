"""`run.json`: one record a run, written at its start, kept true by its events, finished at its end."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from raysys.config import fingerprint
from raysys.plain import ConfigDifference, config_differences
from raysys.strict_json import to_plain
from raysys.train.job import Job, machine, versions

RECORD = "run.json"
_NOT_THE_RUN = ("run_id", "resume", "debug", "dry_run", "runs_folder", "trainer")


def config_hash(config: dict[str, Any]) -> str:
    """A hash of what decides a run's result (not where it runs): two runs with one hash are the same experiment."""
    return fingerprint(_of_the_run(config))


def config_changes(before: dict[str, Any], now: dict[str, Any]) -> list[ConfigDifference]:
    """What differs between a recorded config and one of now, of the keys that decide a run's result."""
    return config_differences(_of_the_run(before), to_plain(_of_the_run(now)))


def _of_the_run(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _NOT_THE_RUN}


class RunRecord:
    """The content of `run.json`; every change is on disk before the call returns."""

    def __init__(self, job: Job, **content: Any) -> None:
        self.path = job.folder / RECORD
        before = read_record(job.folder) or {}
        self.content: dict[str, Any] = {
            "run_id": job.folder.name,
            "status": "running",
            "started": before.get("started", time.time()),
            "finished": None,
            "config": job.config,
            "config_hash": config_hash(job.config),
            "schema_hash": job.schema.fingerprint(),
            "versions": versions(),
            "machine": machine(),
            "seed": job.seed,
            **content,
        }
        self.update()

    def update(self, **content: Any) -> None:
        """Set keys and write the file."""
        self.content |= content
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(to_plain(self.content), indent=1))
        os.replace(temporary, self.path)


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a run folder, or None where there is none (yet)."""
    path = folder / RECORD
    return json.loads(path.read_text()) if path.exists() else None
