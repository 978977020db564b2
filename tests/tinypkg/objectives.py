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

    fault: not_finite (the loss of that step), kill or stop (the process), hold (until the marker exists), or none.
    """

    def __init__(self, schema, *, fault, step, rank, marker):
        super().__init__(schema)
        self.fault, self.step, self.rank, self.calls = fault, step, rank, 0
        self.marker = Path(marker) if marker else None

    def forward(self, model, batch, embedded):
        loss, output, parts = super().forward(model, batch, embedded)
        self.calls += self.training
        if self.training and self.calls == self.step and rank() == self.rank and not self.is_marked():
            loss = self.fail(loss)
        return loss, output, parts | {"click": loss.detach()}

    def is_marked(self):
        return self.marker is not None and self.marker.exists()

    def fail(self, loss):
        if self.fault == "not_finite":
            return loss * float("nan")
        while self.fault == "hold" and not self.is_marked():
            time.sleep(0.05)
        if self.fault in ("kill", "stop"):
            if self.marker is not None:
                self.marker.touch()
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[self.fault])
        return loss
