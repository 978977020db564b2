"""Learning rates over the steps of a run: warm-up, then decay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt


@dataclass(frozen=True)
class Schedule:
    """A factor on the learning rate. It rises linearly over `warmup_steps`, then follows `kind` to the end of the run.

    linear and cosine end at `final` (a share of the learning rate) with the last step; inverse_sqrt falls with the root
    of the number of steps since the end of the warm-up and does not know the end.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    kind: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "constant"
    warmup_steps: NonNegativeInt = 0
    final: NonNegativeFloat = 0.0

    def factor(self, step: int, total_steps: int) -> float:
        """The factor for step 0 .. total_steps - 1; the last step of the warm-up is the first one with the full rate."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        start = max(self.warmup_steps, 1)
        if self.kind == "inverse_sqrt":
            return math.sqrt(start / (step + 1))
        if self.kind == "constant":
            return 1.0
        share = min((step + 1 - start) / max(total_steps - start, 1), 1.0)
        left = 1.0 - share if self.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * share))
        return self.final + (1.0 - self.final) * left
