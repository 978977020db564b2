"""A run's events as TensorBoard event files.

Tags, all over the training step:

- `loss/total`, `loss/<part>`
- `<metric>/<task>/train` (windowed) and `<metric>/<task>/<split>` (whole split), such as `ne/click/valid`
- `learning_rate/<group>`
- `speed/rows_per_second`, `speed/seconds/<part>` (the time of a step by part)
- `embedding/norm_mean/<table>`, `embedding/norm_p99/<table>`, `embedding/never_trained_share/<table>`
- text: `config` (at the run's start)

Slices and calibration curves are in the HTML report only.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from raysys.report.events import Event

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """Writes what it is handed into `folder`, with the events' own times.

    A run that goes back to a checkpoint starts a new file that tells TensorBoard to forget the later steps.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.writer: SummaryWriter | None = None
        self.step = 0
        self.config: str | None = None

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, event: Event) -> None:
        """Take in one event; kinds without a curve are passed over."""
        if event["event"] == "run_started":
            self.config = yaml.safe_dump(event["config"], sort_keys=False)
        elif event["event"] == "run_finished":
            self.close()
        elif event["event"] in ("step", "evaluation", "embedding_health"):
            writer = self._writer_at(event["step"], goes_back=event["event"] == "step")
            for name, value in scalars(event):
                writer.add_scalar(name, value, event["step"], walltime=event["time"])
            if event["event"] == "evaluation":
                writer.flush()

    def close(self) -> None:
        """Flush and close the file; a later event opens a new one."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None

    def _writer_at(self, step: int, goes_back: bool) -> SummaryWriter:
        if goes_back and step <= self.step:
            self.close()
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter  # takes a second

            self.writer = SummaryWriter(str(self.folder), purge_step=step)
            if self.config is not None:
                self.writer.add_text("config", f"```yaml\n{self.config}```", 0)
        self.step = max(step, self.step) if not goes_back else step
        return self.writer


def scalars(event: Event) -> Iterator[tuple[str, float]]:
    """The (tag, value) pairs of an event; values that are None (not a number, or not defined) are left out."""
    pairs = {"step": _of_step, "evaluation": _of_evaluation, "embedding_health": _of_health}[event["event"]](event)
    return ((name, value) for name, value in pairs if value is not None)


_Pairs = Iterator[tuple[str, float | None]]


def _of_step(event: Event) -> _Pairs:
    yield "loss/total", event.get("loss")
    yield "speed/rows_per_second", event.get("rows_per_second")
    for key, prefix in (("parts", "loss"), ("learning_rates", "learning_rate"), ("breakdown", "speed/seconds")):
        for name, value in (event.get(key) or {}).items():
            yield f"{prefix}/{name}", value
    for task, values in (event.get("metrics") or {}).items():
        for metric, value in values.items():
            yield f"{metric}/{task}/train", value


def _of_evaluation(event: Event) -> _Pairs:
    split = "train_whole" if event["split"] == "train" else event["split"]
    for task, values in event["tasks"].items():
        for metric, value in values.items():
            yield f"{metric}/{task}/{split}", value


def _of_health(event: Event) -> _Pairs:
    for table, facts in event["tables"].items():
        for key in ("norm_mean", "norm_p99", "never_trained_share"):
            yield f"embedding/{key}/{table}", facts.get(key)
