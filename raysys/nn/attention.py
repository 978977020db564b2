"""Multi-head attention over events or tokens, with positions by rotation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raysys.errors import UserError
from raysys.nn.mlp import linear

ROTARY_BASE = 10_000.0


def check_heads(heads: int, dim: int, name: str = "embedding_dim", rotary: bool = False) -> None:
    """A `UserError` unless `heads` divides the width `dim`, whose key is `name`, and leaves an even width with `rotary`."""
    step = 2 if rotary else 1
    if heads >= 1 and dim % (step * heads) == 0:
        return
    fitting = [str(number) for number in range(1, dim + 1) if dim % (step * number) == 0]
    if not fitting:
        raise UserError(f"{name} is {dim}", "rotary positions need an even number")
    reason = "into even widths, which rotary positions need" if heads >= 1 and dim % heads == 0 else ""
    raise UserError(
        f"heads {heads} does not divide {name} {dim} {reason}".rstrip(), f"heads can be {', '.join(fitting)}"
    )


class MultiHeadAttention(nn.Module):
    """softmax(Q K^T / √(D/heads)) V for each head, heads side by side, then a linear map; no biases.

    rotary: queries and keys are rotated by their positions (Su et al. 2021, arXiv 2104.09864), so that a score depends on
    positions only through their difference. Position 0 is not rotated. dropout: of the attention weights.
    """

    def __init__(self, dim: int, heads: int, *, rotary: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        check_heads(heads, dim, rotary=rotary)
        self.heads, self.rotary, self.dropout = heads, rotary, dropout
        self.query = linear(dim, dim, bias=False)
        self.key_value = linear(dim, 2 * dim, bias=False)
        self.output = linear(dim, dim, bias=False)

    def forward(
        self, queries: Tensor, keys: Tensor, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Queries [B, Q, D], or [1, Q, D] for all rows, and keys [B, L, D], which are the values too, → [B, Q, D].

        mask: [B, L], the keys that are there; a row without one gives zeros. positions: [L], of a rotary self-attention.
        """
        assert self.rotary == (positions is not None)
        q = self._split(self.query(queries)).expand(len(keys), -1, -1, -1)  # [B, H, Q, D/H]
        k, v = (self._split(part) for part in self.key_value(keys).chunk(2, -1))  # [B, H, L, D/H]
        if positions is not None:
            factors = rotary_factors(positions, q.shape[-1])
            q, k = rotate(q, factors), rotate(k, factors)
        seen, some = None, None
        if mask is not None:
            some = mask.any(1)[:, None, None]  # [B, 1, 1]; a softmax over nothing is NaN on some devices
            seen = (mask[:, None] | ~some)[:, None]  # [B, 1, 1, L]
        mixed = F.scaled_dot_product_attention(q, k, v, seen, self.dropout if self.training else 0.0)
        output = self.output(mixed.transpose(1, 2).flatten(2))
        return output if some is None else output.masked_fill(~some, 0.0)

    def _split(self, x: Tensor) -> Tensor:
        """[B, L, D] → [B, H, L, D/H]."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


def rotary_factors(positions: Tensor, width: int) -> Tensor:
    """Positions [L] → complex [L, width/2]: e^(i angle), angle j = position · ROTARY_BASE^(-2j/width)."""
    powers = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width
    angles = positions[:, None].float() * ROTARY_BASE**-powers  # [L, width/2]
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, factors: Tensor) -> Tensor:
    """[..., L, W], columns 2j and 2j + 1 turned as a pair by `rotary_factors` [L, W/2].

    As complex numbers: a third of the time on a CPU of products with cosines and sines.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * factors).flatten(-2).to(x.dtype)
