"""From the shared representation to one logit per task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from raysys.errors import UserError
from raysys.models.outputs import Output
from raysys.nn.mlp import ParallelLinear, ParallelMLP
from raysys.schema import Label


class Head(Protocol):
    """What makes the module of `predict`: `TaskTowers`, a class of `raysys.models.multitask`, or a `functools.partial` of one.

    The module maps the shared representation [B, inputs] to an `Output`. tower, activation and dropout are the model's.
    """

    def __call__(
        self, labels: Sequence[Label], inputs: int, *, tower: Sequence[int], activation: str, dropout: float
    ) -> nn.Module:
        """The module, its weights drawn from the current generator."""


class TaskTowers(nn.Module):
    """A tower of the same shape for each of T tasks, all in one batched computation.

    tower: hidden widths, before the linear map to one logit.
    split: the input has T equal parts side by side, and the tower of task t sees the t-th only.
    """

    def __init__(
        self,
        labels: Sequence[Label],
        inputs: int,
        *,
        tower: Sequence[int] = (),
        activation: str = "relu",
        dropout: float = 0.0,
        split: bool = False,
    ) -> None:
        super().__init__()
        if split and inputs % len(labels):
            raise UserError(
                f"split towers of {len(labels)} tasks on a shared representation of {inputs} columns",
                "it needs a part for each task: use model/head=towers",
            )
        self.parts = len(labels) if split else 1
        self.hidden = ParallelMLP(len(labels), inputs // self.parts, tower, activation, dropout)
        self.logits = ParallelLinear(len(labels), self.hidden.out_features, 1)

    def forward(self, shared: Tensor) -> Output:
        """[B, inputs], or [T, B, inputs] with an input for each task → logits [B, T], last layers [B, T, tower[-1]]."""
        parts = shared.unflatten(1, (self.parts, -1)).transpose(0, 1) if self.parts > 1 else shared
        hidden = self.hidden(parts)  # [T, B, H']
        logits = self.logits(hidden)[:, :, 0].t()  # [B, T]
        return Output(logits=logits, shared=shared, hidden=hidden.transpose(0, 1))
