"""AdaTT: every task has experts of its own at each level and mixes those of all (Li et al., KDD 2023, arXiv 2304.04959)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raysys.errors import UserError, check_count, nearest
from raysys.models.heads import TaskTowers
from raysys.models.outputs import Output
from raysys.nn.experts import Experts, Gate, check_levels, mix, units
from raysys.schema import Label

V_INITS = ("uniform", "mean")


class NativeResidual(nn.Module):
    """V [U, 1, M]: row u has the scalars v of unit u's own (native) experts, 0 elsewhere.

    counts: experts of each unit, of which the first `gated` have a row. v is fixed to 1 where every unit has one expert.
    """

    native: Tensor

    def __init__(self, counts: Sequence[int], gated: int, v_init: str) -> None:
        super().__init__()
        if v_init not in V_INITS:
            raise UserError(f"unknown v_init {v_init!r}", nearest(v_init, V_INITS))
        sizes = torch.tensor(counts)
        unit_of = torch.arange(len(counts)).repeat_interleave(sizes)  # [M]
        native = (torch.arange(gated)[:, None] == unit_of).float()
        self.register_buffer("native", native[:, None], persistent=False)  # [U, 1, M]
        self.others = sum(counts[gated:])
        self.v: nn.Parameter | None = None
        if max(counts) > 1:
            size = sizes[unit_of[: sum(counts[:gated])]].float()
            uniform = (2 * torch.rand(size.shape) - 1) / size.sqrt()
            self.v = nn.Parameter(uniform if v_init == "uniform" else 1 / size)

    def forward(self) -> Tensor:
        """V [U, 1, M]."""
        return self.native if self.v is None else self.native * F.pad(self.v, (0, self.others))


class AdaTTLevel(nn.Module):
    """(G + V) E in one product: the gate of each unit over all experts, plus the residual of its own ones.

    counts: experts of each unit. gated: only so many units, the first ones, have a gate and an output.
    """

    def __init__(
        self,
        inputs: int,
        widths: Sequence[int],
        counts: Sequence[int],
        gated: int,
        *,
        residual: bool = True,
        v_init: str = "uniform",
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.gated = gated
        self.experts = Experts(inputs, widths, counts, activation, dropout)
        self.gate = Gate(gated, inputs, self.experts.num)
        self.residual = NativeResidual(counts, gated, v_init) if residual else None

    def weights(self, x: Tensor) -> Tensor:
        """G + V, what each gated unit takes of each expert: [B, inputs] or [units, B, inputs] → [U, B, M]."""
        gates = self.gate(units(x, 0, self.gated))  # [U, B, M]
        return gates if self.residual is None else gates + self.residual()

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs], which all units share, or [units, B, inputs] → [U, B, widths[-1]] of the gated units."""
        return mix(self.weights(x), self.experts(x))


class AdaTT(nn.Module):
    """Levels of `AdaTTLevel` over a unit for each task and, in the general form, a shared unit; then a tower per task.

    task_experts: of each task at each level, one number or one for each task. shared_experts: of the shared unit, which the
    last level does not gate; 0 is AdaTT-sp. widths: of an expert, a list for each level. residual: F = A + N; off for the
    ablation only. v_init: uniform in ±√(1/m) (a unit may begin with a negative residual) or mean, 1/m. layer_norm: without
    parameters, after each level, as the residual makes each level's output larger; for more than 3 levels. tower,
    activation, dropout: as in `Head`; activation and dropout act in the experts as well.

    Equations, v and the last level are those of the official code (facebookresearch/AdaTT); the settings of the paper's
    public experiments were not seen. v_init mean and layer_norm are not in it. Linear maps start as all of raysys do.
    """

    def __init__(
        self,
        labels: Sequence[Label],
        inputs: int,
        *,
        task_experts: int | Sequence[int] = 2,
        shared_experts: int = 1,
        widths: Sequence[Sequence[int]] = ((64,), (32,)),
        residual: bool = True,
        v_init: str = "uniform",
        layer_norm: bool = False,
        tower: Sequence[int] = (),
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        tasks = len(labels)
        counts = _experts_of_tasks(task_experts, tasks)
        if check_count("shared_experts", shared_experts, 0):
            counts.append(shared_experts)
        self.layer_norm = layer_norm
        self.levels = nn.ModuleList()
        levels, width = check_levels(widths), inputs
        for number, level in enumerate(levels, start=1):
            gated = len(counts) if number < len(levels) else tasks
            self.levels.append(
                AdaTTLevel(
                    width,
                    level,
                    counts,
                    gated,
                    residual=residual,
                    v_init=v_init,
                    activation=activation,
                    dropout=dropout,
                )
            )
            width = level[-1]
        self.towers = TaskTowers(labels, width, tower=tower, activation=activation, dropout=dropout)

    def forward(self, shared: Tensor) -> Output:
        """[B, inputs] → logits [B, T]."""
        x = shared
        for level in self.levels:
            x = level(x)  # [U, B, D]
            x = F.layer_norm(x, x.shape[2:]) if self.layer_norm else x
        return dataclasses.replace(self.towers(x), shared=shared)


def _experts_of_tasks(task_experts: int | Sequence[int], tasks: int) -> list[int]:
    counts = [task_experts] * tasks if isinstance(task_experts, int) else list(task_experts)
    if len(counts) != tasks:
        raise UserError(f"task_experts has {len(counts)} numbers for {tasks} tasks", "give one number, or one per task")
    return [check_count("task_experts", count) for count in counts]
