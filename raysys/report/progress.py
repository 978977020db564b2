"""Training as it goes, on the terminal: a live display, or a plain line now and then where there is no terminal."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from raysys.report.events import Event
from raysys.report.format import METRICS, SPLITS, compact, count, duration, in_order, metric_title, number

_SHOWN_TASKS = 12
_SHOWN_METRICS = ("ne", "auc", "calibration", "rmse", "recall@10", "ndcg@10")
_LINE_TASKS = 3
_STYLES = {"finished": "green", "early_stopped": "green", "failed": "red", "interrupted": "yellow"}


class Progress:
    """Shows the events that it is handed: rows/s, loss, metrics by task and split, time to go.

    On a terminal it redraws in place. Elsewhere (a pipe, a file, a job's log) it prints at most one line in `interval`
    seconds, whatever happens, and one when the run ends. It writes to standard error unless a console is given.
    """

    def __init__(self, console: Console | None = None, interval: float = 10.0) -> None:
        self.console = console or Console(stderr=True)
        self.interval = interval
        self.printed_at: float | None = None
        self.started: Event = {}
        self.step: Event = {}
        self.evaluations: dict[str, Event] = {}
        self.warning: str | None = None
        self.finished: Event | None = None
        self.last_time = 0.0
        live = self.console.is_terminal and not self.console.is_dumb_terminal
        self.live = Live(get_renderable=self._display, console=self.console, refresh_per_second=4) if live else None

    def __enter__(self) -> Progress:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def update(self, event: Event) -> None:
        """Take in one event, of any kind; the display follows."""
        kind = event["event"]
        self.last_time = event["time"]
        if kind == "run_started":
            self.started, self.step, self.finished = event, {}, None
        elif kind == "step":
            self.step = event
        elif kind == "evaluation":
            self.evaluations[event["split"]] = event
        elif kind == "warning":
            self.warning = event["message"]
        elif kind == "run_finished":
            self.finished = event
        if self.live is None:
            self._print(always=kind == "run_finished")

    def _print(self, always: bool) -> None:
        now = time.monotonic()
        if always or self.printed_at is None or now - self.printed_at >= self.interval:
            self.printed_at = now
            self.console.print(self._line(), soft_wrap=True, markup=False, highlight=False)
            self.warning = None  # once is enough where lines stay

    def _line(self) -> str:
        parts = [str(self.started.get("run_id", "run")), self._position()]
        if self.step:
            parts += [f"{compact(self.step.get('rows_per_second'))} rows/s", f"loss {number(self.step.get('loss'))}"]
            parts += _figures("train", self.step.get("metrics") or {})
        for split in in_order(list(self.evaluations), SPLITS):
            parts += _figures(split, self.evaluations[split]["tasks"])
        if self.finished is None and self.step.get("eta_seconds") is not None:
            parts.append(f"ETA {duration(self.step['eta_seconds'])}")
        if self.warning is not None:
            parts.append(f"warning: {self.warning}")
        return "  ".join(part for part in parts if part)

    def _position(self) -> str:
        end = f"{_status(self.finished)} after {duration(self.finished.get('seconds'))}" if self.finished else ""
        if not self.step:
            return end or f"starting {self._where()}"
        total = self.started.get("total_steps")
        step = f"step {count(self.step['step'])}{f'/{count(total)}' if total else ''}"
        return "  ".join(part for part in (end, step, f"epoch {self.step['epoch'] + 1}") if part)

    def _where(self) -> str:
        ranks, device = self.started.get("world_size"), self.started.get("device")
        return f"{ranks} {'rank' if ranks == 1 else 'ranks'} on {device}" if ranks else ""

    def _display(self) -> RenderableType:
        if not self.started and not self.step:
            return Text("waiting for the workers to start", style="dim")
        head = Text(str(self.started.get("run_id", "run")), style="bold")
        parameters = self.started.get("parameters")
        for fact in (self._where(), f"{compact(sum(parameters.values()))} parameters" if parameters else ""):
            head.append(f"  {fact}" if fact else "", style="dim not bold")
        rows: list[RenderableType] = [head, self._bar()]
        if self.step or self.evaluations:
            rows.append(Padding(self._metrics(), (1, 0, 0, 0)))
        if self.warning is not None:
            rows.append(Text(f"warning: {self.warning}", style="yellow"))
        if self.finished is not None:
            status = self.finished["status"]
            message = self.finished.get("message")
            rows.append(
                Text(f"{_status(self.finished)}{f': {message}' if message else ''}", style=_STYLES.get(status, ""))
            )
        return Group(*rows)

    def _bar(self) -> RenderableType:
        total, step = self.started.get("total_steps"), self.step.get("step", 0)
        grid = Table.grid(padding=(0, 2), expand=True)
        grid.add_column(ratio=1)
        elapsed = self.last_time - self.started.get("time", self.last_time)
        eta = self.step.get("eta_seconds")
        left = f"ETA {duration(eta)}" if eta is not None and self.finished is None else f"{duration(elapsed)}"
        facts = [self._position() if self.finished is None else f"step {count(step)}"]
        facts += (
            [f"{compact(self.step.get('rows_per_second'))} rows/s", f"loss {number(self.step.get('loss'))}"]
            if self.step
            else []
        )
        for _ in range(len(facts) + 1):
            grid.add_column(no_wrap=True)
        bar = ProgressBar(total=total or None, completed=step, pulse=not total and self.finished is None)
        grid.add_row(bar, *facts, Text(left, style="cyan"))
        return Constrain(grid, 110)

    def _metrics(self) -> Table:
        """A row for each task and split, with the step at which it was measured."""
        measured = {"train": (self.step.get("metrics") or {}, self.step.get("step"))} if self.step else {}
        for split in in_order(list(self.evaluations), SPLITS):
            event = self.evaluations[split]
            measured["train (whole)" if split == "train" else split] = (event["tasks"], event["step"])
        tasks = list(dict.fromkeys(task for values, _ in measured.values() for task in values))
        found = {metric for values, _ in measured.values() for row in values.values() for metric in row}
        metrics = [metric for metric in _SHOWN_METRICS if metric in found]
        table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
        for title in ("task", "split"):
            table.add_column(title)
        for title in (*map(metric_title, metrics), "at step"):
            table.add_column(title, justify="right")
        for task in tasks[:_SHOWN_TASKS]:
            for split, (values, step) in measured.items():
                cells = [number((values.get(task) or {}).get(metric)) for metric in metrics]
                table.add_row(Text(task), Text(split), *cells, count(step))
        return table


def _status(finished: Event) -> str:
    return str(finished["status"]).replace("_", " ")


def _figures(split: str, tasks: dict[str, dict[str, float | None]]) -> list[str]:
    texts = []
    for task, values in list(tasks.items())[:_LINE_TASKS]:
        figures = [
            f"{METRICS[metric].title} {number(values[metric])}"
            for metric in ("ne", "auc", "rmse", "recall@10")
            if values.get(metric) is not None
        ]
        if figures:
            texts.append(f"{split} {task}: {', '.join(figures)}")
    return texts
