"""Feature interactions on a token matrix X [B, m, d].

The modules are the six of DHEN (arXiv 2203.11014): each maps [B, m, d] → [B, l, d] and ends in `output`, a map without
bias. What the paper leaves open stands in the docstring of the module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raysys.nn.mlp import MLP, activation, linear


class _PairwiseDots(torch.autograd.Function):
    """⟨x_i, x_j⟩ for i < j. Its gradient is S X with S the symmetric matrix of incoming gradients.

    That is one product where autograd takes two, and a gather where autograd scatters: 4 times faster on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, pairs: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, places)
        return torch.bmm(tokens, tokens.mT).flatten(1).index_select(1, pairs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        tokens, places = ctx.saved_tensors
        symmetric = gradient.index_select(1, places).unflatten(1, (tokens.shape[1], tokens.shape[1]))  # [B, m, m]
        symmetric.diagonal(dim1=1, dim2=2).zero_()
        return torch.bmm(symmetric, tokens), None, None


class PairwiseDots(nn.Module):
    """DLRM's interaction: the products ⟨x_i, x_j⟩ of all pairs of tokens i < j, in the order (0, 1), (0, 2), …"""

    pairs: Tensor
    places: Tensor

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        rows, columns = torch.triu_indices(num_tokens, num_tokens, offset=1)
        self.out_features = len(rows)
        places = torch.zeros(
            num_tokens, num_tokens, dtype=torch.int64
        )  # of each pair's product; the diagonal's is unused
        places[rows, columns] = places[columns, rows] = torch.arange(self.out_features)
        self.register_buffer("pairs", rows * num_tokens + columns, persistent=False)
        self.register_buffer("places", places.flatten(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, m, d] → [B, m(m-1)/2]."""
        if self.out_features == 0:
            return tokens.new_zeros(tokens.shape[0], 0)
        device = tokens.device.type
        if torch.is_autocast_enabled(device):  # here, so that forward and backward run in one precision
            tokens = tokens.to(torch.get_autocast_dtype(device))
        return _PairwiseDots.apply(tokens, self.pairs, self.places)


class TokenMap(nn.Module):
    """out[b, j] = Σ_i W[i, j] x[b, i], W [m, l]: mixes tokens, not their columns. DHEN's `linear` and its shortcut."""

    def __init__(self, num_tokens: int, tokens_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(num_tokens, tokens_out)))

    def forward(self, x: Tensor) -> Tensor:
        """[B, m, d] → [B, l, d]."""
        return torch.bmm(self.weight.t().expand(x.shape[0], -1, -1), x)


class TokensFromVector(nn.Linear):
    """W_m, which makes l tokens of a vector."""

    def __init__(self, inputs: int, tokens_out: int, dim: int) -> None:
        super().__init__(inputs, tokens_out * dim, bias=False)
        nn.init.xavier_uniform_(self.weight)
        self.shape = (tokens_out, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, h] → [B, l, d]."""
        return super().forward(x).unflatten(1, self.shape)


class LinearInteraction(nn.Module):
    """W^T X."""

    def __init__(self, num_tokens: int, tokens_out: int) -> None:
        super().__init__()
        self.output = TokenMap(num_tokens, tokens_out)

    def forward(self, x: Tensor) -> Tensor:
        """[B, m, d] → [B, l, d]."""
        return self.output(x)


class DotInteraction(nn.Module):
    """MLP([⟨x_i, x_j⟩ for i < j ‖ vec(X W_c)]), then W_m; W_c [d, compress], no such part where compress is 0."""

    def __init__(
        self, num_tokens: int, dim: int, tokens_out: int, *, compress: int, hidden: Sequence[int], activation_name: str
    ) -> None:
        super().__init__()
        self.dots = PairwiseDots(num_tokens)
        self.compress = linear(dim, compress, bias=False) if compress > 0 else None
        self.mlp = MLP(self.dots.out_features + num_tokens * compress, hidden, activation_name)
        self.output = TokensFromVector(self.mlp.out_features, tokens_out, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, m, d] → [B, l, d]."""
        vector = self.dots(x)  # [B, m(m-1)/2]
        if self.compress is not None:
            vector = torch.cat([vector, self.compress(x).flatten(1)], 1)
        return self.output(self.mlp(vector))


class SelfAttentionInteraction(nn.Module):
    """One Transformer encoder layer (norm after each half, no positions) over the tokens, then a token map."""

    def __init__(
        self, num_tokens: int, dim: int, tokens_out: int, *, heads: int, d_ff: int, activation_name: str
    ) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(
            dim, heads, d_ff, dropout=0.0, activation=activation(activation_name), batch_first=True
        )
        self.output = TokenMap(num_tokens, tokens_out)

    def forward(self, x: Tensor) -> Tensor:
        """[B, m, d] → [B, l, d]."""
        return self.output(self.encoder(x))


class CrossInteraction(nn.Module):
    """x ⊙ (U V^T x + b) on x = vec(X), U and V [md, rank], then a token map: DCNv2's low-rank cross without its skip."""

    def __init__(self, num_tokens: int, dim: int, tokens_out: int, *, rank: int) -> None:
        super().__init__()
        self.down = linear(num_tokens * dim, rank, bias=False)
        self.up = linear(rank, num_tokens * dim)
        self.output = TokenMap(num_tokens, tokens_out)

    def forward(self, x: Tensor) -> Tensor:
        """[B, m, d] → [B, l, d]."""
        flat = x.flatten(1)  # [B, md]
        return self.output((flat * self.up(self.down(flat))).view_as(x))


class ConvInteraction(nn.Module):
    """A convolution over the m x d plane to `channels`, the activation, 1 x 1 back to one channel, then a token map."""

    def __init__(
        self, num_tokens: int, dim: int, tokens_out: int, *, channels: int, kernel: int, activation_name: str
    ) -> None:
        super().__init__()
        self.convolve = nn.Conv2d(1, channels, kernel, padding="same")
        self.activation = activation(activation_name)
        self.merge = nn.Conv2d(channels, 1, 1)
        for layer in (self.convolve, self.merge):
            nn.init.xavier_uniform_(layer.weight)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        self.output = TokenMap(num_tokens, tokens_out)

    def forward(self, x: Tensor) -> Tensor:
        """[B, m, d] → [B, l, d]."""
        planes = self.activation(self.convolve(x[:, None]))  # [B, channels, m, d]
        return self.output(self.merge(planes)[:, 0])


class MLPInteraction(nn.Module):
    """MLP(vec(X)), then W_m."""

    def __init__(
        self, num_tokens: int, dim: int, tokens_out: int, *, hidden: Sequence[int], activation_name: str
    ) -> None:
        super().__init__()
        self.mlp = MLP(num_tokens * dim, hidden, activation_name)
        self.output = TokensFromVector(self.mlp.out_features, tokens_out, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, m, d] → [B, l, d]."""
        return self.output(self.mlp(x.flatten(1)))
