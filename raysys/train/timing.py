"""Where a step's time goes, seen from the host."""

from __future__ import annotations

import time

from raysys.train.optimizers import Optimizers


class StepTimer:
    """Sums the time between marks by name; the pipelines of TorchRec have no hooks, so the marks sit at their edges.

    On a GPU the host runs ahead: a phase is then the time to launch it, and waiting shows in the phase that waits.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def mark(self, phase: str) -> None:
        """The time since the mark before belongs to `phase`."""
        now = time.perf_counter()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def skip(self) -> None:
        """The time since the mark before belongs to no phase (evaluation, checkpoints)."""
        self._last = time.perf_counter()

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        seconds, self._seconds = self._seconds, {}
        return seconds


class TimedOptimizer:
    """The optimisers of a run as TorchRec's pipelines want them, with a mark after each phase of the step."""

    def __init__(self, optimizers: Optimizers, timer: StepTimer, first_step: int) -> None:
        self._optimizers, self._timer, self._step = optimizers, timer, first_step

    def zero_grad(self) -> None:
        """Drop the gradients of the dense parameters."""
        self._optimizers.zero_grad()

    def step(self) -> None:
        """Set learning rates and update the dense parameters (fused tables are updated in the backward pass)."""
        self._timer.mark("backward")
        self._optimizers.step(self._step)
        self._step += 1
        self._timer.mark("optimizer")
