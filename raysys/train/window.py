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


class Window:
    """Collects without waiting for the device; `take` is collective and is what costs."""

    def __init__(self, schema: FeatureSchema, timer: StepTimer) -> None:
        self._metrics = WindowMetrics(schema)
        self._timer = timer
        self._losses: list[dict[str, Tensor]] = []
        self._rows = 0
        self._speeds: list[float] = []
        self._breakdowns: list[dict[str, float]] = []

    def start(self, rows: int) -> None:
        """Begin where `rows` rows of the run are trained."""
        self._rows = rows

    def update(self, outputs: dict[str, Any]) -> None:
        """Take what TrainStep gave for one batch; nothing leaves its device yet."""
        batch: Batch = outputs["batch"]
        self._metrics.update(outputs["logits"], batch)
        self._losses.append(outputs["losses"])

    def take(self, rows: int, steps_left: int) -> dict[str, Any]:
        """The fields of a step event, when `rows` rows of the run are trained (collective), and start afresh."""
        steps = len(self._losses)
        means = {name: torch.stack([loss[name] for loss in self._losses]).mean() for name in self._losses[0]}
        losses = {name: float(global_sum(mean)) / world_size() for name, mean in means.items()}
        breakdown = {name: seconds / steps for name, seconds in self._timer.take().items()}
        seconds_per_step = sum(breakdown.values())
        self._speeds.append((rows - self._rows) / steps / seconds_per_step)
        self._breakdowns.append(breakdown)
        self._losses, self._rows = [], rows
        return {
            "rows": rows,
            "rows_per_second": self._speeds[-1],
            "loss": losses.pop("loss"),
            "parts": losses,
            "metrics": self._metrics.compute(),
            "breakdown": breakdown,
            "eta_seconds": steps_left * seconds_per_step,
        }

    def summary(self) -> dict[str, Any]:
        """Medians over the step events: rows per second and seconds of a step by phase."""
        phases = {name for breakdown in self._breakdowns for name in breakdown}
        return {
            "rows_per_second": median(self._speeds) if self._speeds else None,
            "step_breakdown": {
                name: median(breakdown.get(name, 0.0) for breakdown in self._breakdowns) for name in sorted(phases)
            },
        }
