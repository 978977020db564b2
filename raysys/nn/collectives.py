"""Sums and gathers over the ranks of the default process group. Without a process group all of them are the identity.

Every function but the first three is collective: all ranks call it, in the same order, or all of them hang.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

_CHUNK_BYTES = 16 << 20  # what one gather moves per rank: bounds the memory it takes on a GPU


def is_distributed() -> bool:
    """Whether a process group exists (of one rank, too)."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """The number of ranks; 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    """This process's place in 0 .. world_size() - 1; 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def communication_device() -> torch.device:
    """Where a tensor must be to take part in a collective: NCCL takes tensors of the current GPU only, gloo any on the CPU."""
    if is_distributed() and "cpu" not in str(dist.get_backend_config()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def global_sum(value: Tensor) -> Tensor:
    """The sum of `value` over all ranks, as a new tensor that carries no gradient on any rank.

    So it serves as the denominator of a loss, or as a statistic. A loss that needs the gradient of a sum over ranks keeps
    its own share local, times `world_size()`: data-parallel training averages gradients over ranks, which makes it whole.
    """
    total = value.detach().clone(memory_format=torch.contiguous_format)
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def global_max(value: Tensor) -> Tensor:
    """The elementwise maximum of `value` over all ranks, as a new tensor that carries no gradient."""
    largest = value.detach().clone(memory_format=torch.contiguous_format)
    if world_size() > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        parts = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, value.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        shares = [share.contiguous() for share in gradient.chunk(world_size())]
        own = torch.empty_like(shares[0])
        dist.reduce_scatter(own, shares)
        return own


def gather_with_grad(value: Tensor) -> Tensor:
    """`value` [n, ...] of all ranks, in rank order: [W n, ...], differentiable. The shape must be the same on all ranks.

    The gradient of this rank's rows is the *sum* over ranks of what each rank's loss says about them, so every rank must run
    the backward pass. With losses that add up to W times the global loss the average over ranks is the global gradient.
    """
    return cast(Tensor, _GatherWithGrad.apply(value)) if world_size() > 1 else value


def gather_rows(rows: Tensor) -> Tensor | None:
    """`rows` [n, ...] of all ranks, in rank order, on the CPU of rank 0; None on the others. n may differ and may be 0.

    Sent in pieces, so that a GPU holds no more than W pieces of 16 MiB whatever n is; rank 0's CPU holds all rows.
    """
    if world_size() == 1:
        return rows.cpu()
    device = communication_device()
    own_count = torch.tensor([len(rows)], device=device)
    counts = [torch.zeros_like(own_count) for _ in range(world_size())]
    dist.all_gather(counts, own_count)
    sizes = [int(count) for count in counts]
    step = max(_CHUNK_BYTES // (rows.element_size() * max(math.prod(rows.shape[1:]), 1)), 1)
    received: list[list[Tensor]] = [[] for _ in sizes]
    for start in range(0, max(sizes), step):
        length = min(step, max(sizes) - start)
        piece = torch.zeros(length, *rows.shape[1:], dtype=rows.dtype, device=device)
        own = rows[start : start + length]
        piece[: len(own)] = own
        buffers = [torch.empty_like(piece) for _ in sizes] if rank() == 0 else None
        dist.gather(piece, buffers, dst=0)
        for parts, size, buffer in zip(received, sizes, buffers or [], strict=False):
            parts.append(buffer[: max(min(size - start, length), 0)].cpu())
    if rank() != 0:
        return None
    return torch.cat([rows[:0].cpu(), *(part for parts in received for part in parts)])


def on_first_rank(function: Callable[[], T]) -> T:
    """What `function` returns on rank 0, on every rank (pickled). An exception there is raised on every rank, so none waits."""
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            if world_size() == 1:
                raise
            outcome[1] = error
    if world_size() > 1:
        dist.broadcast_object_list(outcome, src=0, device=communication_device())
    if outcome[1] is not None:
        raise outcome[1]
    return cast(T, outcome[0])
