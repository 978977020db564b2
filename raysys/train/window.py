"""What the step events say: losses, metrics and speed since the event before."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
from torch import Tensor

from raysys.data.batch import Batch
from raysys.nn.collectives import global_sum, world_size
from raysys.schema import FeatureSchema
from raysys.train.metrics import WindowMetrics
from raysys.train.timing import StepTimer

_LOSS = "loss."


class Window:
    """Collects without waiting for the device; `take` is collective and is what costs."""

    def __init__(self, schema: FeatureSchema | None, timer: StepTimer) -> None:
        """schema: whose tasks are measured by the logits; None tells losses and speed alone."""
        self._metrics = WindowMetrics(schema) if schema is not None else None
        self._timer = timer
        self._losses: list[dict[str, Tensor]] = []
        self._steps_before, self._sums_before = 0, dict[str, float]()  # of the checkpoint that the window goes on from
        self._rows = 0
        self._speeds: list[float] = []
        self._breakdowns: list[dict[str, float]] = []

    def start(self, rows: int) -> None:
        """Begin where `rows` rows of the run are trained."""
        self._rows = rows

    def update(self, outputs: dict[str, Any]) -> None:
        """Take what TrainStep gave for one batch; nothing leaves its device yet."""
        batch: Batch = outputs["batch"]
        if self._metrics is not None:
            self._metrics.update(outputs["logits"], batch)
        self._losses.append(outputs["losses"])

    def take(self, rows: int, steps_left: int) -> dict[str, Any]:
        """The fields of a step event, when `rows` rows of the run are trained (collective), and start afresh."""
        steps = len(self._losses)
        losses = {name: total / (self._steps_before + steps) for name, total in self._loss_sums().items()}
        breakdown = {name: seconds / steps for name, seconds in self._timer.take().items()}
        seconds_per_step = sum(breakdown.values())
        self._speeds.append((rows - self._rows) / steps / seconds_per_step)
        self._breakdowns.append(breakdown)
        self._losses, self._rows, self._steps_before, self._sums_before = [], rows, 0, {}
        return {
            "rows": rows,
            "rows_per_second": self._speeds[-1],
            "loss": losses.pop("loss"),
            "parts": losses,
            "metrics": self._metrics.compute() if self._metrics is not None else {},
            "breakdown": breakdown,
            "eta_seconds": steps_left * seconds_per_step,
        }

    def state(self) -> dict[str, Tensor]:
        """Losses and metrics since the last event over all ranks, on the CPU; whole on rank 0 only (collective).

        Speeds are left out: those of a resumed run begin anew.
        """
        steps = torch.tensor(self._steps_before + len(self._losses))
        losses = {
            f"{_LOSS}{name}": torch.tensor(total, dtype=torch.float64) for name, total in self._loss_sums().items()
        }
        return {"steps": steps, **losses, **(self._metrics.state() if self._metrics is not None else {})}

    def load(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Go on from a state, on any number of ranks; device: of the outputs that will come."""
        self._losses, self._steps_before = [], int(state["steps"])
        self._sums_before = {
            name.removeprefix(_LOSS): float(total) for name, total in state.items() if name.startswith(_LOSS)
        }
        if self._metrics is not None:
            self._metrics.load(state, device)

    def _loss_sums(self) -> dict[str, float]:
        """The mean over the ranks of each loss, summed over the steps (collective).

        In float64, where a sum of float32 is exact but for rare cases: it does not matter where a resume has cut it.
        """
        if not self._losses:
            return dict(self._sums_before)
        names = list(self._losses[0])
        local = torch.stack([torch.stack([loss[name] for loss in self._losses]).double().sum() for name in names])
        totals = (global_sum(local) / world_size()).tolist()
        return {name: self._sums_before.get(name, 0.0) + total for name, total in zip(names, totals, strict=True)}

    def summary(self) -> dict[str, Any]:
        """Medians over the step events: rows per second and seconds of a step by phase."""
        phases = {name for breakdown in self._breakdowns for name in breakdown}
        return {
            "rows_per_second": median(self._speeds) if self._speeds else None,
            "step_breakdown": {
                name: median(breakdown.get(name, 0.0) for breakdown in self._breakdowns) for name in sorted(phases)
            },
        }
