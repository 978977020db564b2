"""Wukong: stacked factorisation machines (Zhang et al. 2024, arXiv 2403.02545)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from raysys.errors import check_count
from raysys.models.outputs import Embedded
from raysys.models.ranking.base import RankingModel, SharedArguments
from raysys.nn.interactions import TokenMap, TokensFromVector
from raysys.nn.mlp import MLP
from raysys.nn.random import seeded
from raysys.schema import FeatureSchema


class FactorizationBlock(nn.Module):
    """FMB(X) = reshape(MLP(LN(vec(X (X^T Y))))), Y [n, k] learned: X X^T is never formed, the cost is n k d.

    hidden: hidden widths of the MLP, before its linear map (without bias) to `tokens_out` tokens.
    """

    def __init__(
        self,
        num_tokens: int,
        dim: int,
        tokens_out: int,
        *,
        rank: int,
        hidden: Sequence[int],
        activation_name: str,
        dropout: float,
    ) -> None:
        super().__init__()
        self.project = TokenMap(num_tokens, rank)  # its weight is Y
        self.norm = nn.LayerNorm(num_tokens * rank)
        self.mlp = MLP(num_tokens * rank, hidden, activation_name, dropout)
        self.output = TokensFromVector(self.mlp.out_features, tokens_out, dim)

    def products(self, x: Tensor) -> Tensor:
        """[B, n, d] → [B, n, k]: X X^T Y, the matrix of dot products with its columns mixed."""
        return torch.bmm(x, self.project(x).mT)

    def forward(self, x: Tensor) -> Tensor:
        """[B, n, d] → [B, n_F, d]."""
        return self.output(self.mlp(self.norm(self.products(x).flatten(1))))


class WukongLayer(nn.Module):
    """X' = LN([FMB(X) ‖ LCB(X)] + R(X)), LCB(X) = W_L X: n tokens become n_F + n_L.

    R is the identity where the number of tokens stays (no parameter then), else a learned token map. LN is over the columns
    of each token.
    """

    def __init__(
        self,
        num_tokens: int,
        dim: int,
        *,
        fm_tokens: int,
        linear_tokens: int,
        rank: int,
        hidden: Sequence[int],
        activation_name: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.tokens_out = fm_tokens + linear_tokens
        self.factorization = FactorizationBlock(
            num_tokens, dim, fm_tokens, rank=rank, hidden=hidden, activation_name=activation_name, dropout=dropout
        )
        self.compression = TokenMap(num_tokens, linear_tokens)
        self.residual = TokenMap(num_tokens, self.tokens_out) if num_tokens != self.tokens_out else nn.Identity()
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, n, d] → [B, n_F + n_L, d]."""
        return self.norm(torch.cat([self.factorization(x), self.compression(x)], 1) + self.residual(x))


class Wukong(RankingModel):
    """`layers` layers of a factorisation machine beside a linear compression, then one MLP (`tower`) per task on all tokens.

    Layer l adds interactions up to order 2^l. The equations are those of the paper as open code has them; the axis of the
    norms, initialisation and sizes are our choice. The paper's variant in which Y depends on X is not offered: its formula
    was not seen.
    fm_tokens, linear_tokens: n_F and n_L, the tokens that the two blocks of each layer give. rank: k, the columns of Y.
    hidden: hidden widths of the MLP in each FMB, none for a linear map. dropout: in these MLPs and the towers.
    The other arguments are those of `RankingModel`.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        embedding_dim: int = 64,
        layers: int = 3,
        fm_tokens: int = 40,
        linear_tokens: int = 40,
        rank: int = 8,
        hidden: Sequence[int] = (512, 256),
        tower: Sequence[int] = (256, 128),
        activation: str = "relu",
        dropout: float = 0.0,
        **shared: Unpack[SharedArguments],
    ) -> None:
        super().__init__(
            schema,
            embedding_dim=embedding_dim,
            tower=tower,
            activation=activation,
            dropout=dropout,
            **shared,
        )
        sizes = {"layers": layers, "fm_tokens": fm_tokens, "linear_tokens": linear_tokens, "rank": rank}
        for name, size in sizes.items():
            check_count(name, size)
        num_tokens = len(self.tokens.names)
        self.layers = nn.Sequential()
        with seeded(self.seed, "interactions"):
            for _ in range(layers):
                layer = WukongLayer(
                    num_tokens,
                    embedding_dim,
                    fm_tokens=fm_tokens,
                    linear_tokens=linear_tokens,
                    rank=rank,
                    hidden=hidden,
                    activation_name=activation,
                    dropout=dropout,
                )
                self.layers.append(layer)
                num_tokens = layer.tokens_out
        self.add_towers(num_tokens * embedding_dim)

    def interact(self, embedded: Embedded) -> Tensor:
        """[B, H]: the tokens of the last layer side by side."""
        return self.layers(self.tokens(embedded)).flatten(1)
