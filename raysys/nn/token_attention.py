"""Attention between the tokens of a row: Hiformer's layer with its simpler forms, and AutoInt's.

A token stands for a feature, always at the same place, so no layer knows positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysys.errors import UserError, nearest
from raysys.nn.mlp import activation, linear

ATTENTIONS = ("vanilla", "heterogeneous", "composite")


def _matrices(*shape: int, fan_in: int) -> nn.Parameter:
    """Uniform weights of variance 1 / fan_in: what comes out has the variance of what goes in."""
    bound = (3 / fan_in) ** 0.5
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


class TokenLinear(nn.Module):
    """x_i W_i + b_i, a map of its own for each of n tokens; with n = 1 all tokens share it."""

    def __init__(self, num_tokens: int, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = _matrices(num_tokens, inputs, outputs, fan_in=inputs)
        self.bias = nn.Parameter(torch.zeros(num_tokens, 1, outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, n, inputs] → [B, n, outputs]; any number of tokens where they share the map."""
        if self.weight.shape[0] == 1:
            return F.linear(x, self.weight[0].t(), None if self.bias is None else self.bias[0, 0])
        x = x.transpose(0, 1)  # [n, B, inputs]
        mapped = torch.bmm(x, self.weight) if self.bias is None else torch.baddbmm(self.bias, x, self.weight)
        return mapped.transpose(0, 1)


class TokenNorm(nn.Module):
    """LayerNorm over a token's columns with a scale and a shift for each of n tokens; with n = 1 all tokens share them."""

    def __init__(self, num_tokens: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_tokens, dim))
        self.bias = nn.Parameter(torch.zeros(num_tokens, dim))

    def forward(self, x: Tensor) -> Tensor:
        """[B, n, dim] → the same; any number of tokens where they share it."""
        shape = (x.shape[2],)
        if self.weight.shape[0] == 1:
            return F.layer_norm(x, shape, self.weight[0], self.bias[0])
        return torch.addcmul(self.bias, F.layer_norm(x, shape), self.weight)


class CompositeLinear(nn.Module):
    """vec(X) W: each of the n tokens that come out is computed from all tokens that go in.

    rank: W = L R of this rank, L [num_tokens · dim, rank]; None is a full matrix.
    """

    def __init__(self, num_tokens: int, dim: int, tokens_out: int, outputs: int, rank: int | None) -> None:
        super().__init__()
        inputs, self.shape = num_tokens * dim, (tokens_out, outputs)
        self.down = None if rank is None else _matrices(inputs, rank, fan_in=inputs)
        self.weight = _matrices(rank or inputs, tokens_out * outputs, fan_in=rank or inputs)

    def forward(self, x: Tensor) -> Tensor:
        """[B, num_tokens, dim] → [B, tokens_out, outputs]."""
        flat = x.flatten(1)  # [B, num_tokens · dim]
        return ((flat if self.down is None else flat @ self.down) @ self.weight).unflatten(1, self.shape)


@dataclass(frozen=True)
class AttentionSizes:
    """Of a layer of tokens of width `dim`: columns of a head's keys and values, inner width, ranks (None: full)."""

    dim: int
    heads: int
    key_dim: int
    value_dim: int
    d_ff: int
    key_rank: int | None = None
    value_rank: int | None = None


class TokenAttention(nn.Module):
    """o_i = concat_h(Σ_j softmax_j(q_i · k_j / √key_dim) v_j) O_i over all L tokens j, for the last `queries` tokens i.

    attention: vanilla (q, k, v and O are maps that all tokens share) | heterogeneous (each token has its own) | composite
    (as heterogeneous, but k_j and v_j are computed from all tokens; with `composite_queries` q_i as well).
    One factorisation of a low rank is for all heads. Composite queries are of rank `key_rank` where that is less than
    their own width.
    """

    def __init__(
        self, num_tokens: int, queries: int, sizes: AttentionSizes, attention: str, composite_queries: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.queries, self.composite_queries = sizes.heads, queries, composite_queries
        self.scale = sizes.key_dim**-0.5
        keys, values = sizes.heads * sizes.key_dim, sizes.heads * sizes.value_dim
        shared = attention == "vanilla"
        self.query: nn.Module = TokenLinear(1 if shared else queries, sizes.dim, keys)
        self.key: nn.Module = TokenLinear(1 if shared else num_tokens, sizes.dim, keys)
        self.value: nn.Module = TokenLinear(1 if shared else num_tokens, sizes.dim, values)
        self.output = TokenLinear(1 if shared else queries, values, sizes.dim)
        if attention == "composite":
            self.key = CompositeLinear(num_tokens, sizes.dim, num_tokens, keys, sizes.key_rank)
            self.value = CompositeLinear(num_tokens, sizes.dim, num_tokens, values, sizes.value_rank)
        if composite_queries:
            rank = sizes.key_rank if sizes.key_rank and sizes.key_rank < queries * keys else None
            self.query = CompositeLinear(num_tokens, sizes.dim, queries, keys, rank)

    def weights(self, x: Tensor) -> Tensor:
        """[B, L, D] → [B, heads, queries, L]: how much each query sees of each token, 1 in total."""
        query = self.query(x if self.composite_queries else x[:, -self.queries :])
        scores = torch.matmul(self._by_head(query), self._by_head(self.key(x)).mT)
        return (scores * self.scale).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] → [B, queries, D]."""
        attended = torch.matmul(self.weights(x), self._by_head(self.value(x)))  # [B, heads, queries, value_dim]
        mapped: Tensor = self.output(attended.transpose(1, 2).flatten(2))
        return mapped

    def _by_head(self, x: Tensor) -> Tensor:
        """[B, n, heads · d] → [B, heads, n, d]."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class TokenAttentionLayer(nn.Module):
    """A Transformer layer over L tokens (arXiv 2311.05884): `TokenAttention`, then an MLP for each token.

    queries: the last so many tokens come out, None for all; weights that only other tokens would need are not made.
    norm_first: the norms stand before the attention and the MLP instead of after the sums. dropout: of what both add.
    """

    def __init__(
        self,
        num_tokens: int,
        sizes: AttentionSizes,
        *,
        attention: str = "composite",
        queries: int | None = None,
        composite_queries: bool = False,
        norm_first: bool = False,
        activation_name: str = "gelu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if attention not in ATTENTIONS:
            raise UserError(f"unknown attention {attention!r}", nearest(attention, ATTENTIONS))
        if composite_queries and attention != "composite":
            raise UserError(f"composite_queries with attention {attention!r}", "use attention 'composite'")
        self.queries, self.norm_first = queries or num_tokens, norm_first
        self.attention = TokenAttention(num_tokens, self.queries, sizes, attention, composite_queries)
        maps = 1 if attention == "vanilla" else self.queries
        normed = 1 if attention == "vanilla" else num_tokens if norm_first else self.queries
        self.mlp = nn.Sequential(
            TokenLinear(maps, sizes.dim, sizes.d_ff, bias=True),
            activation(activation_name),
            TokenLinear(maps, sizes.d_ff, sizes.dim, bias=True),
        )
        self.attention_norm, self.mlp_norm = TokenNorm(normed, sizes.dim), TokenNorm(maps, sizes.dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] → [B, queries, D]."""
        asking = x[:, -self.queries :]
        if self.norm_first:
            y = asking + self.dropout(self.attention(self.attention_norm(x)))
            return y + self.dropout(self.mlp(self.mlp_norm(y)))
        y = self.attention_norm(asking + self.dropout(self.attention(x)))
        return self.mlp_norm(y + self.dropout(self.mlp(y)))


class InteractingLayer(nn.Module):
    """AutoInt's layer (arXiv 1810.11921): ReLU(concat_h(Σ_j a_ij W_V x_j) + W_res x_i), a_ij = softmax_j ⟨W_Q x_i, W_K x_j⟩.

    All tokens share the maps, which have no bias. scaled: the products are divided by √head_dim, which the paper does not.
    dropout: of the a_ij.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, scaled: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.scale = heads, head_dim**-0.5 if scaled else 1.0
        self.out_features = heads * head_dim
        self.dropout = nn.Dropout(dropout)
        self.query, self.key, self.value, self.residual = (linear(dim, self.out_features, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """[B, m, dim] → [B, m, heads · head_dim]."""
        query, key, value = (self._by_head(part(x)) for part in (self.query, self.key, self.value))
        weights = (torch.matmul(query, key.mT) * self.scale).softmax(-1)  # [B, heads, m, m]
        attended = torch.matmul(self.dropout(weights), value).transpose(1, 2).flatten(2)
        return torch.relu(attended + self.residual(x))

    def _by_head(self, x: Tensor) -> Tensor:
        """[B, m, heads · d] → [B, heads, m, d]."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)
