"""From the shared representation to one logit per task."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from raysys.models.outputs import Output
from raysys.nn.mlp import ParallelLinear, ParallelMLP


class TaskTowers(nn.Module):
    """A tower of the same shape for each of T tasks, all in one batched computation."""

    def __init__(
        self, num_tasks: int, inputs: int, widths: Sequence[int], activation: str = "relu", dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.hidden = ParallelMLP(num_tasks, inputs, widths, activation, dropout)
        self.logits = ParallelLinear(num_tasks, self.hidden.out_features, 1)

    def forward(self, shared: Tensor) -> Output:
        """[B, inputs] → logits [B, T] and the last layer of each tower [B, T, widths[-1]]."""
        hidden = self.hidden(shared)  # [T, B, H']
        logits = self.logits(hidden)[:, :, 0].t()  # [B, T]
        return Output(logits=logits, shared=shared, hidden=hidden.transpose(0, 1))
