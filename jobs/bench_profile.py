"""What limits a figure that missed its target: operators by their time side by side, or the functions of the reader."""

from __future__ import annotations

import cProfile
import importlib
import io
import json
import pstats
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from bench_rival import LOG, THREADS, Rival
from torch.profiler import ProfilerActivity, profile

SHOWN = 30
WHOLE = "(the whole step, with the profiler)"
Recorder = tuple[str, dict[str, Any]]
"""A function of this file that writes a table of operators, and its options but `path`."""


def compare(recorders: Mapping[str, Recorder], path: Path, processes: int = 1) -> Path:
    """Let two recorders run one after the other, each in processes of its own, and write their tables side by side."""
    tables = {}
    for name, (target, options) in recorders.items():
        found = path.with_suffix(f".{name}.json")
        with Rival(target, {**options, "path": str(found)}, path.parent / LOG, processes) as rival:
            rival.turn()
        tables[name] = json.loads(found.read_text())
        found.unlink()
    path.write_text(side_by_side(tables))
    return path


def side_by_side(tables: Mapping[str, dict[str, float]]) -> str:
    """Milliseconds of a step by operator of two tables, the largest differences first."""
    (first, a), (second, b) = tables.items()
    lines = [f"{'milliseconds of a step':<60}{first:>12}{second:>12}{'difference':>12}"]
    names = sorted({*a, *b}, key=lambda name: -abs(a.get(name, 0.0) - b.get(name, 0.0)))
    for name in names[:SHOWN]:
        x, y = a.get(name, 0.0), b.get(name, 0.0)
        lines.append(f"{name[:58]:<60}{x:>12.3f}{y:>12.3f}{y - x:>+12.3f}")
    return "\n".join(lines) + "\n"


def rival(target: str, options: dict[str, Any], path: str) -> Iterator[float]:
    """Recorder of one turn of a rival; `options["steps"]` is the length of its turn."""
    module, _, function = target.partition(":")
    rates = getattr(importlib.import_module(module), function)(**options)
    next(rates)
    recording = Recording(options["steps"])
    next(rates)
    _write(recording, path)
    return iter((0.0, 0.0))


def raysys(run: dict[str, Any], path: str) -> Iterator[float]:
    """Recorder of raysys's train loop without Ray, in as many processes as `run`, a `bench_raysys.Run`, has workers."""
    from bench_raysys import Run

    from raysys.train.job import set_up_process
    from raysys.train.launch import Worker
    from raysys.train.loop import TrainLoop

    set_up_process(THREADS)
    prepared = Run(**{**run, "folder": Path(run["folder"])}).prepare_turns()
    steps, steps_done = run["steps"], 0
    recordings: list[Recording] = []

    def stop_wanted() -> bool:
        """The loop asks after every step."""
        nonlocal steps_done
        steps_done += 1
        if steps_done == steps:
            recordings.append(Recording(steps))
        if steps_done == 2 * steps:
            _write(recordings[0], path)
        return False

    TrainLoop(Worker(prepared.job, torch.device("cpu"), lambda event: None, stop_wanted), prepared.plan).run()
    return iter((0.0, 0.0))


class Recording:
    """A running torch profiler over `steps` steps."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._profiler = profile(activities=[ProfilerActivity.CPU], acc_events=True)
        self._profiler.start()
        self._started = time.perf_counter()

    def stop(self) -> dict[str, float]:
        """Stop; milliseconds of its own in a step by operator, with two entries in brackets: the rest, and `WHOLE`."""
        wall = (time.perf_counter() - self._started) * 1e3 / self._steps
        self._profiler.stop()
        table: dict[str, float] = {}
        for event in self._profiler.key_averages():
            name = re.sub(r"\d+", "N", event.key) if event.key.startswith("##") else event.key  # "load batch 7"
            table[name] = table.get(name, 0.0) + event.self_cpu_time_total / 1e3 / self._steps
        table["(outside of operators: Python, waiting)"] = wall - sum(table.values())
        table[WHOLE] = wall
        return table


def _write(recording: Recording, path: str) -> None:
    """The table of rank 0 as JSON."""
    table = recording.stop()
    if torch.distributed.get_rank() == 0:
        Path(path).write_text(json.dumps(table))


def functions(rates: Iterator[float], path: Path) -> Path:
    """Profile one turn in this process by Python function."""
    profiler = cProfile.Profile()
    profiler.runcall(next, rates)
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(SHOWN)
    path.write_text(text.getvalue())
    return path
