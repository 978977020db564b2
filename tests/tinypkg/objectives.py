"""An objective of the user's own, with faults to order."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from raysys.nn.collectives import rank
from raysys.objectives.supervised import Supervised


class Faulty(Supervised):
    """Supervised, with a fault in step `step` of a process, on rank `rank`, unless the file `marker` exists.

    fault: not_finite (the loss of that step), kill or stop (the process), slow (every step, from the first one on), or none.
    """

    def __init__(self, schema, *, fault, step, rank, marker):
        super().__init__(schema)
        self.fault, self.step, self.rank, self.calls = fault, step, rank, 0
        self.marker = Path(marker) if marker else None

    def forward(self, model, batch, embedded):
        loss, output, parts = super().forward(model, batch, embedded)
        self.calls += self.training
        if self.training and not (self.marker and self.marker.exists()):
            if self.fault == "slow":
                time.sleep(0.1)
            elif self.calls == self.step and rank() == self.rank:
                loss = self.fail(loss)
        return loss, output, parts | {"click": loss.detach()}

    def fail(self, loss):
        if self.fault in ("kill", "stop"):
            if self.marker:
                self.marker.touch()
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[self.fault])
        return loss * float("nan") if self.fault == "not_finite" else loss
