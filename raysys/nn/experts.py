"""Experts side by side, gates over them, and what gates make of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raysys.errors import UserError
from raysys.nn.mlp import ParallelLinear, ParallelMLP


class Experts(ParallelMLP):
    """M MLPs of one shape in U units, one unit after another; an expert reads what its unit reads.

    counts: number of experts of each unit, 0 allowed. The activation follows every layer, the last one too.
    """

    unit_of: Tensor

    def __init__(
        self,
        inputs: int,
        widths: Sequence[int],
        counts: Sequence[int],
        activation_name: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(sum(counts), inputs, widths, activation_name, dropout)
        unit_of = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        self.register_buffer("unit_of", unit_of, persistent=False)  # [M]

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs], which all share, or [U, B, inputs] with an input for each unit → [M, B, widths[-1]]."""
        return super().forward(x if x.dim() == 2 else x.index_select(0, self.unit_of))


class Gate(ParallelLinear):
    """`num` gates side by side: softmax(x W + b), one linear map each."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs], which all share, or [num, B, inputs] → [num, B, outputs], whose last axis sums to 1."""
        return super().forward(x).softmax(2)


def mix(weights: Tensor, experts: Tensor) -> Tensor:
    """Σ over experts e of weights[u, b, e] · experts[e, b]: [U, B, M] and [M, B, D] → [U, B, D]."""
    return torch.bmm(weights.transpose(0, 1), experts.transpose(0, 1)).transpose(0, 1)  # einsum takes a fifth longer


def units(x: Tensor, start: int, stop: int) -> Tensor:
    """The input of the units start to stop - 1: a part of [U, B, D], or [B, D] itself, which all share."""
    return x if x.dim() == 2 else x[start:stop]


def check_levels(widths: Sequence[Sequence[int]]) -> list[list[int]]:
    """`widths` of a network of levels of experts, as lists; anything but positive widths for each level is a `UserError`."""
    nested = [[] if isinstance(level, (int, str)) else list(level) for level in widths]
    if not nested or not all(level and min(level) >= 1 for level in nested):
        raise UserError(
            f"widths is {list(widths)}",
            "give the widths of an expert for each level: [[64], [32]] are two levels, [[64, 32]] is one of two layers",
        )
    return nested
