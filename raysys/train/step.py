"""Model and objective as the one module that is sharded, pipelined and trained."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raysys.data.batch import Batch

Precision = Literal["float32", "bfloat16"]


@torch.fx.wrap
def _detached(loss: Tensor, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"loss": loss.detach()} | {name: part.detach() for name, part in parts.items()}


class TrainStep(nn.Module):
    """`forward(batch)` gives the loss and what the train loop looks at: `losses`, `logits [B, T]` and the batch itself.

    `TrainPipelineSparseDist` traces `forward` down to the table modules, so that their inputs travel while the batch
    before is still in computation. Whatever holds no table is called, not traced: the objective, and the parts of
    `model.embed` around the tables. Therefore nothing here may depend on values or iterate over what the objective gave.
    """

    model: Any  # an nn.Module with embed, interact and predict

    def __init__(self, model: nn.Module, objective: nn.Module, precision: Precision = "float32") -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.precision = precision

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        """The loss of this rank's rows, to be averaged over the ranks, and detached outputs."""
        low = self.precision == "bfloat16"
        with torch.autocast(self._device_type, torch.bfloat16) if low else nullcontext():
            loss, output, parts = self.objective(self.model, batch, self.model.embed(batch))
        return loss, {"losses": _detached(loss, parts), "logits": output.logits.detach().float(), "batch": batch}

    @property
    def _device_type(self) -> str:
        return next(self.parameters()).device.type
