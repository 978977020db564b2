"""What factorisation machines are made of, on a token matrix X [B, m, d]."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raysys.nn.mlp import linear


def pairwise_products(x: Tensor) -> Tensor:
    """[B, m, d] → [B, d]: Σ_{i<j} x_i ⊙ x_j, whose sum over columns is the pairwise term of a factorisation machine.

    Computed as ½((Σ x_i)² - Σ x_i²), in time linear in m.
    """
    return 0.5 * (x.sum(1).square() - x.square().sum(1))


class TokenScores(nn.Module):
    """⟨w_i, x_i⟩ of each token i: the first-order terms of a factorisation machine.

    Of an id with embedding x that is a weight of its own, as in a table of width 1, but one that the embedding determines.
    """

    def __init__(self, num_tokens: int, dim: int) -> None:
        super().__init__()
        bound = (6 / (dim + 1)) ** 0.5  # Xavier's, of a linear map from d columns to one
        self.weight = nn.Parameter(torch.empty(num_tokens, dim).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """[B, m, d] → [B, m]."""
        return (x * self.weight).sum(2)


class CompressedInteractions(nn.Module):
    """xDeepFM's CIN: maps X^k_h = Σ_ij W^k_hij (X^{k-1}_i ⊙ X^0_j), X^0 the tokens; each map is summed over its columns.

    maps: the number of maps of each layer. No bias and no activation between layers (the paper found the identity best),
    so every number that comes out of layer k is homogeneous of degree k + 1 in the tokens. Without an activation the last
    layer needs no maps: the sums over columns are Σ_ij W_hij ⟨X_i, X^0_j⟩, d times cheaper. A layer in between keeps
    B · d · m · maps numbers for its gradient.
    """

    def __init__(self, num_tokens: int, maps: Sequence[int]) -> None:
        super().__init__()
        pairs = itertools.pairwise([num_tokens, *maps])
        self.layers = nn.ModuleList(linear(num_tokens * before, after, bias=False) for before, after in pairs)
        self.out_features = sum(maps)

    def forward(self, x: Tensor) -> Tensor:
        """[B, m, d] → [B, sum(maps)], the layers one after another."""
        tokens = x.mT  # [B, d, m], as every map below: the columns before the tokens
        current, sums = tokens, []
        for layer in self.layers[:-1]:
            products = (current[..., None] * tokens[:, :, None]).flatten(2)  # [B, d, H m]
            current = layer(products)  # [B, d, H']
            sums.append(current.sum(1))
        dots = torch.bmm(current.mT, tokens)  # [B, H, m]
        sums.append(self.layers[-1](dots.flatten(1)))
        return torch.cat(sums, 1)


class BilinearFusion(nn.Module):
    """FinalMLP's fusion of two streams: Σ_h u_h^T W_h v_h, u_h and v_h the h-th of `heads` equal parts of u and v.

    outputs: forms side by side, each with its own W [heads, d_u / heads, d_v / heads]. heads divides both widths.
    """

    def __init__(self, first: int, second: int, heads: int, outputs: int) -> None:
        super().__init__()
        assert first % heads == 0
        assert second % heads == 0
        self.heads = heads
        self.weight = nn.Parameter(torch.empty(heads, first // heads, outputs, second // heads))
        # Xavier's bound of one matrix, and of a sum of `heads` products.
        bound = (6 / (first + second)) ** 0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        """u [B, d_u], v [B, d_v] → [B, outputs]."""
        parts = u.unflatten(1, (self.heads, -1)).transpose(0, 1)  # [heads, B, d_u / heads]
        mapped = torch.bmm(parts, self.weight.flatten(2)).unflatten(2, self.weight.shape[2:])  # [heads, B, outputs, ·]
        sides = mapped.permute(1, 2, 0, 3).flatten(2)  # [B, outputs, d_v]
        return torch.bmm(sides, v[:, :, None])[:, :, 0]
