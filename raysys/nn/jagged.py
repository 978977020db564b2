"""Jagged rows: `values [N, D]` of all rows one after another, row b from `offsets[b]` to `offsets[b + 1]`."""

from __future__ import annotations

import fbgemm_gpu  # noqa: F401  (registers torch.ops.fbgemm)
import torch
from torch import Tensor


def pad(values: Tensor, offsets: Tensor, max_length: int) -> Tensor:
    """[N, D] → [B, max_length, D]: each row from the left, zeros after its end, what is beyond max_length cut off."""
    return torch.ops.fbgemm.jagged_to_padded_dense(values, [offsets], [max_length], 0.0)


def length_mask(lengths: Tensor, max_length: int) -> Tensor:
    """[B, max_length] bool, true where `pad` put a value."""
    return torch.arange(max_length, device=lengths.device) < lengths[:, None]


def pool(values: Tensor, offsets: Tensor, weights: Tensor | None = None, mean: bool = False) -> Tensor:
    """[N, D] → [B, D]: the sum of each row, weighted by `weights [N]`, or its mean. An empty row gives zeros."""
    if weights is not None:
        values = values * weights[:, None]
    # `unsafe` skips checks of the offsets that would wait for the GPU.
    sums = torch.segment_reduce(values, "sum", offsets=offsets, initial=0.0, unsafe=True)
    return sums / offsets.diff().clamp(min=1)[:, None] if mean else sums
