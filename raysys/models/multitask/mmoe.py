"""MMoE: experts that all tasks share and a gate for each task (Ma et al., KDD 2018)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor, nn

from raysys.errors import check_count
from raysys.models.heads import TaskTowers
from raysys.models.outputs import Output
from raysys.nn.experts import Experts, Gate, check_levels, mix
from raysys.schema import Label


class MMoE(nn.Module):
    """u_t = Σ_e softmax(x W_t + b_t)_e f_e(x), then a tower per task.

    experts: number of experts E of each level. widths: of an expert, a list for each level. With several levels (of the
    AdaTT repository, not of the paper) expert e of a level reads a mixture of its own of the level before; every gate reads
    x itself. one_gate: all tasks have the gate of the last level in common (OMoE). tower, activation, dropout: as in `Head`;
    activation and dropout act in the experts as well.
    """

    def __init__(
        self,
        labels: Sequence[Label],
        inputs: int,
        *,
        experts: int = 4,
        widths: Sequence[Sequence[int]] = ((64, 32),),
        one_gate: bool = False,
        tower: Sequence[int] = (),
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_count("experts", experts)
        levels = check_levels(widths)
        self.tasks = len(labels)
        gates = [experts] * (len(levels) - 1) + [1 if one_gate else self.tasks]
        self.experts, self.gates = nn.ModuleList(), nn.ModuleList()
        width = inputs
        for level, num_gates in zip(levels, gates, strict=True):
            self.experts.append(Experts(width, level, [1] * experts, activation, dropout))
            self.gates.append(Gate(num_gates, inputs, experts))
            width = level[-1]
        self.towers = TaskTowers(labels, width, tower=tower, activation=activation, dropout=dropout)

    def forward(self, shared: Tensor) -> Output:
        """[B, inputs] → logits [B, T]."""
        x = shared
        for experts, gate in zip(self.experts, self.gates, strict=True):
            x = mix(gate(shared), experts(x))  # [E, B, D], at the end [T, B, D] or [1, B, D]
        return dataclasses.replace(self.towers(x.expand(self.tasks, -1, -1)), shared=shared)
