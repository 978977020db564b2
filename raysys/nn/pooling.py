"""From a sequence to one vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def mean_pool(sequence: Tensor, mask: Tensor) -> Tensor:
    """[B, L, D], mask [B, L] → [B, D]: the mean of the events that are there, zeros for an empty sequence."""
    weights = mask.to(sequence.dtype) / mask.sum(1, keepdim=True).clamp(min=1)  # [B, L]
    return torch.bmm(weights[:, None], sequence)[:, 0]


class AttentionPool(nn.Module):
    """Softmax attention over the events of a sequence: weight of event h ∝ exp(⟨u, h⟩ / √D), u = q + A a.

    q is learned and starts at 0; a is the target item and A starts as the identity, so that at first events like the target
    weigh more. Keys and values are the events themselves: no product of size L x D x D, and few parameters to over-fit with.
    """

    def __init__(self, dim: int, with_target: bool = True) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(dim))
        self.target = nn.Linear(dim, dim, bias=False) if with_target else None
        if self.target is not None:
            nn.init.eye_(self.target.weight)

    def forward(self, sequence: Tensor, mask: Tensor, target: Tensor | None = None) -> Tensor:
        """[B, L, D], mask [B, L], target [B, D] where it was built with one → [B, D], zeros for an empty sequence."""
        if self.target is None:
            scores = sequence @ self.query  # [B, L]
        else:
            assert target is not None
            scores = torch.bmm(sequence, (self.query + self.target(target))[:, :, None])[:, :, 0]  # [B, L]
        scores = scores / sequence.shape[2] ** 0.5
        # The smallest number, not -inf: a row without events must give 0, not NaN.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(1) * mask
        return torch.bmm(weights[:, None], sequence)[:, 0]
