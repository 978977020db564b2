from __future__ import annotations

import io

import pytest
from rich.console import Console

from raysys.report import progress as module
from raysys.report.progress import Progress


class Clock:
    """In place of the module `time`."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def show(events: list[dict], clock: Clock, seconds_per_event: float, terminal: bool = False) -> str:
    console = Console(
        file=io.StringIO(), force_terminal=terminal, width=120, color_system=None, _environ={"TERM": "xterm"}
    )
    with Progress(console, interval=10) as progress:
        for event in events:
            progress.update(event)
            clock.now += seconds_per_event
    return console.file.getvalue()


def test_one_line_in_ten_seconds_where_there_is_no_terminal(events, clock):
    lines = show(events, clock, seconds_per_event=1.0).splitlines()
    assert len(events) == 82
    assert len(lines) == 9 + 1  # at 0, 10, … 80 s, and the end
    assert lines[0] == "dhen-movielens  starting 2 ranks on cpu"
    assert lines[-1].startswith("dhen-movielens  finished after 1m 11s  step 600/600  epoch 3  ")
    assert "\x1b" not in "".join(lines)


def test_a_line_has_what_a_person_asks_for(events, clock):
    line = show(events[:30], clock, seconds_per_event=10.0).splitlines()[-1]
    for part in (
        "step 220/600",
        "epoch 2",
        "rows/s",
        "loss 0.",
        "train like: NE 0.",
        "AUC 0.",
        "valid finish: NE 0.",
        "ETA 38.0s",
    ):
        assert part in line, part


def test_a_fast_run_prints_its_first_and_last_line(events, clock):
    assert len(show(events, clock, seconds_per_event=0.001).splitlines()) == 2


def test_the_end_of_a_run_that_never_trained(events, clock):
    end = {"event": "run_finished", "time": 1.7e9, "status": "failed", "seconds": 2.0, "message": "no"}
    assert show([events[0], end], clock, 0.1).splitlines()[-1] == "dhen-movielens  failed after 2.0s"


def test_values_that_are_missing_are_dashes(events, clock):
    step = {
        "event": "step",
        "time": 1.7e9,
        "step": 1,
        "epoch": 0,
        "rows": 1,
        "rows_per_second": None,
        "loss": None,
        "metrics": {"like": {"ne": None}},
    }
    assert show([step], clock, 0.1) == "run  step 1  epoch 1  – rows/s  loss –\n"  # noqa: RUF001


def test_a_warning_is_shown_once_with_the_next_line(events, clock):
    warning = {"event": "warning", "time": 1.7e9, "step": 7, "message": "a checkpoint is damaged"}
    lines = show([events[0], warning, *events[2:6]], clock, seconds_per_event=6.0).splitlines()
    assert [("warning: a checkpoint is damaged" in line) for line in lines] == [False, True, False]
    assert "warning: a checkpoint" in show([events[0], warning], clock, 0.1, terminal=True)


def test_a_terminal_gets_a_live_table(events, clock):
    text = show(events, clock, seconds_per_event=0.01, terminal=True)
    last = text[text.rindex("dhen-movielens") :]
    for part in (
        "2 ranks on cpu",
        "269k parameters",
        "step 600",
        "rows/s",
        "1m 11s",
        "task",
        "Calibration",
        "finish",
        "0.8563",
        "finished",
    ):
        assert part in last, part
    assert text.endswith("\x1b[?25h")  # the cursor is back
