"""Agreement of all ranks on stopping: a loss that is not finite anywhere, or a request to stop."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from raysys.data.batch import Batch
from raysys.nn.collectives import world_size


@dataclass(frozen=True)
class Verdict:
    """What the ranks agreed on about one step: the names of losses that were not finite, and whether to stop."""

    step: int
    not_finite: tuple[str, ...]
    stop: bool


class StepGuard:
    """One small all-reduce a step, awaited one step later, so that no rank leaves the others waiting in a collective.

    What is reduced are the losses themselves: their sum over the ranks is not finite where one of them is not.
    The batch of the step under examination is kept, so that the offending one can be saved.
    """

    def __init__(self) -> None:
        self._pending: tuple[int, tuple[str, ...], Tensor, dist.Work | None] | None = None
        self.batch: Batch | None = None

    def submit(self, step: int, losses: dict[str, Tensor], stop: bool, batch: Batch) -> Verdict | None:
        """Start the agreement on `step` and return the verdict on the step before, if one is pending."""
        verdict = self.settle()
        values = torch.stack([*losses.values(), torch.full_like(next(iter(losses.values())), stop)])
        work = dist.all_reduce(values, async_op=True) if world_size() > 1 else None
        self._pending = (step, tuple(losses), values, work)
        if verdict is None or not verdict.not_finite:
            self.batch = batch
        return verdict

    def settle(self) -> Verdict | None:
        """Wait for the pending agreement and return its verdict."""
        if self._pending is None:
            return None
        step, names, sums, work = self._pending
        self._pending = None
        if work is not None:
            work.wait()
        *values, stop = sums.tolist()
        not_finite = tuple(name for name, value in zip(names, values, strict=True) if not math.isfinite(value))
        return Verdict(step, not_finite, stop > 0)
