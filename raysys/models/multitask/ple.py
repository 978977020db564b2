"""PLE and CGC: experts of each task beside shared ones (Tang et al., RecSys 2020)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raysys.errors import UserError, check_count
from raysys.models.heads import TaskTowers
from raysys.models.outputs import Output
from raysys.nn.experts import Experts, Gate, check_levels, mix, units
from raysys.schema import Label


class CGC(nn.Module):
    """One level: each task mixes its own experts and the shared ones; the shared unit, where it has a gate, mixes all.

    The units are the T tasks and, if there are shared experts, the shared unit after them.
    """

    places: Tensor

    def __init__(
        self,
        inputs: int,
        widths: Sequence[int],
        tasks: int,
        task_experts: int,
        shared_experts: int,
        *,
        shared_gate: bool,
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.tasks = tasks
        counts = [task_experts] * tasks + ([shared_experts] if shared_experts else [])
        self.experts = Experts(inputs, widths, counts, activation, dropout)
        self.task_gates = Gate(tasks, inputs, task_experts + shared_experts)
        self.shared_gate = Gate(1, inputs, self.experts.num) if shared_gate and shared_experts else None
        own = torch.arange(tasks * task_experts).view(tasks, task_experts)
        common = torch.arange(tasks * task_experts, self.experts.num).expand(tasks, -1)
        self.register_buffer("places", torch.cat([own, common], 1)[:, None], persistent=False)  # [T, 1, m_t + m_s]

    def weights(self, x: Tensor) -> Tensor:
        """What each gated unit takes of each expert: [B, inputs] or [U, B, inputs] → [U, B, M], rows that sum to 1."""
        gates = self.task_gates(units(x, 0, self.tasks))  # [T, B, m_t + m_s]
        zeros = gates.new_zeros(*gates.shape[:2], self.experts.num)
        weights = zeros.scatter(2, self.places.expand_as(gates), gates)  # [T, B, M]
        if self.shared_gate is None:
            return weights
        return torch.cat([weights, self.shared_gate(units(x, self.tasks, self.tasks + 1))])

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs], which all units share, or [U, B, inputs] → [U, B, widths[-1]] of the gated units."""
        return mix(self.weights(x), self.experts(x))


class PLE(nn.Module):
    """Levels of `CGC`, in which each unit reads its own output of the level before, then a tower per task.

    task_experts, shared_experts: of each task and of the shared unit at each level; either may be 0. All tasks have the same
    number, so that their gates are one product; `AdaTT` takes one for each. widths: of an expert, a list for each level; one
    level is CGC. The last level has no shared gate. tower, activation, dropout: as in `Head`; activation and dropout act in
    the experts as well.
    """

    def __init__(
        self,
        labels: Sequence[Label],
        inputs: int,
        *,
        task_experts: int = 2,
        shared_experts: int = 1,
        widths: Sequence[Sequence[int]] = ((64,), (32,)),
        tower: Sequence[int] = (),
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_count("task_experts", task_experts, 0)
        check_count("shared_experts", shared_experts, 0)
        if task_experts + shared_experts == 0:
            raise UserError("task_experts and shared_experts are both 0", "a task needs an expert")
        self.levels = nn.Sequential()
        levels, width = check_levels(widths), inputs
        for number, level in enumerate(levels, start=1):
            self.levels.append(
                CGC(
                    width,
                    level,
                    len(labels),
                    task_experts,
                    shared_experts,
                    shared_gate=number < len(levels),
                    activation=activation,
                    dropout=dropout,
                )
            )
            width = level[-1]
        self.towers = TaskTowers(labels, width, tower=tower, activation=activation, dropout=dropout)

    def forward(self, shared: Tensor) -> Output:
        """[B, inputs] → logits [B, T]."""
        return dataclasses.replace(self.towers(self.levels(shared)), shared=shared)
