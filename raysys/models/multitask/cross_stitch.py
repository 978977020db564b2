"""Cross-stitch networks: a network per task, and learned mixtures of them after each level (Misra et al., CVPR 2016)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raysys.models.heads import TaskTowers
from raysys.models.outputs import Output
from raysys.nn.experts import check_levels
from raysys.nn.mlp import ParallelMLP
from raysys.schema import Label


class CrossStitchLevel(nn.Module):
    """v_t = f_t(u_t), then Σ_k A[t, k] v_k, A a learned T x T matrix that does not depend on the input."""

    def __init__(
        self, tasks: int, inputs: int, widths: Sequence[int], own: float, activation: str, dropout: float
    ) -> None:
        super().__init__()
        self.networks = ParallelMLP(tasks, inputs, widths, activation, dropout)
        others = (1 - own) / (tasks - 1) if tasks > 1 else 0.0
        diagonal = own if tasks > 1 else 1.0
        self.stitch = nn.Parameter(torch.full((tasks, tasks), others).fill_diagonal_(diagonal))

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs], which all tasks share, or [T, B, inputs] → [T, B, widths[-1]]."""
        values = self.networks(x)  # [T, B, D]
        return torch.mm(self.stitch, values.flatten(1)).view(values.shape)


class CrossStitch(nn.Module):
    """Levels of `CrossStitchLevel`, then a tower per task.

    widths: of a task's network, a list for each level. own: what A starts with on its diagonal; the other tasks share the
    rest, as in the paper's 0.9 and 0.1. The paper has a matrix per channel, here it is one per level. tower, activation,
    dropout: as in `Head`; activation and dropout act in the levels as well.
    """

    def __init__(
        self,
        labels: Sequence[Label],
        inputs: int,
        *,
        widths: Sequence[Sequence[int]] = ((64,), (32,)),
        own: float = 0.9,
        tower: Sequence[int] = (),
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.levels, width = nn.Sequential(), inputs
        for level in check_levels(widths):
            self.levels.append(CrossStitchLevel(len(labels), width, level, own, activation, dropout))
            width = level[-1]
        self.towers = TaskTowers(labels, width, tower=tower, activation=activation, dropout=dropout)

    def forward(self, shared: Tensor) -> Output:
        """[B, inputs] → logits [B, T]."""
        return dataclasses.replace(self.towers(self.levels(shared)), shared=shared)
