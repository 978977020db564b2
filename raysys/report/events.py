"""The events of a run: one JSON object per line of `events.jsonl`, written while training and read by everything here.

Every event has `event` (its kind) and `time` (unix seconds). Kinds, as training emits them:

- `run_started`: run_id, config, schema, world_size, device, parameters, bytes_per_rank, flops_per_row, total_steps, tasks
- `plan`: tables, each with table, rows, width, sharding, kernel, ranks, bytes_per_rank
- `step`: step, epoch, rows, rows_per_second, loss, parts, metrics (windowed, by task), learning_rates, breakdown, eta_seconds
- `evaluation`: step, epoch, split, seconds, tasks, slices, calibration_curve
- `checkpoint`: step, path, bytes, seconds, reason
- `embedding_health`: step, tables by name: rows, norm_mean, norm_p99, never_trained_share, hot_ids
- `resumed`: step, path (training goes on from a checkpoint); `warning`: step, message
- `run_finished`: status, step, seconds, message

Writers may be killed in the middle of a line, so readers skip a line that is not complete.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raysys.strict_json import to_plain

Event = dict[str, Any]

_TAIL_BYTES = 1 << 16


class EventWriter:
    """Appends events to a file. The file is opened for each event, so a writer can be pickled and is never left open."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def write(self, event: Event) -> None:
        """Append one event as one line, with the present `time` where it has none."""
        line = json.dumps({"time": time.time(), **to_plain(event)}, allow_nan=False, ensure_ascii=False)
        content = line.encode("utf-8", "replace") + b"\n"
        with open(self.path, "a+b") as file:
            # A writer that was killed may have left half a line: it must not swallow this event.
            if file.seek(0, 2) > 0:
                file.seek(-1, 2)
                content = content if file.read(1) == b"\n" else b"\n" + content
            file.write(content)


class EventTail:
    """Reads a growing file of events from where the last call stopped; a file that does not exist yet is empty."""

    def __init__(self, path: str | Path, position: int = 0) -> None:
        self.path = Path(path)
        self.position = position
        self.damaged = 0
        """Complete lines that were not an event: what a killed writer left."""

    def poll(self) -> Iterator[Event]:
        """The events whose lines were completed since the last call."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self.position)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # still being written, or torn by a kill
                self.position += len(line)
                event = _parse(line)
                if event is not None:
                    yield event
                elif line.strip():
                    self.damaged += 1


def read_events(path: str | Path) -> list[Event]:
    """All complete events of a file, oldest first."""
    return list(EventTail(path).poll())


def last_event(path: str | Path) -> Event | None:
    """The newest complete event, found from the end of the file without reading the rest."""
    path = Path(path)
    if not path.exists():
        return None
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        window = _TAIL_BYTES
        while True:
            file.seek(max(0, size - window))
            lines = file.read().split(b"\n")[:-1]
            # Where the window starts inside a line, the first piece does not parse: it is the end of an event.
            event = next(filter(None, map(_parse, reversed(lines))), None)
            if event is not None or window >= size:
                return event
            window *= 8


def _parse(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:  # torn by a kill; also what is no UTF-8
        return None
    return event if isinstance(event, dict) and "event" in event else None
