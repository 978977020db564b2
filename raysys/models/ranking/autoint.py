"""AutoInt: self-attention between the tokens (Song et al. 2019, arXiv 1810.11921)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from raysys.errors import check_count
from raysys.models.outputs import Embedded
from raysys.models.ranking.base import PlainArguments, RankingModel
from raysys.nn.mlp import MLP
from raysys.nn.random import seeded
from raysys.nn.token_attention import InteractingLayer
from raysys.schema import FeatureSchema


class AutoInt(RankingModel):
    """z = w^T vec(X') with X' the tokens after `layers` interacting layers; AutoInt+ adds the logit of an MLP on vec(X).

    heads, head_dim: of each layer, whose tokens have heads · head_dim columns. scaled: divide scores by √head_dim.
    deep: widths of the MLP of AutoInt+; none for AutoInt. With the default `tower`, none, a task's logit is linear in both
    parts: the sum of their two logits. dropout: of the attention's weights, in the MLP and in the towers.
    The default sizes are the paper's, from memory. The other arguments are those of `RankingModel`.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        layers: int = 3,
        heads: int = 2,
        head_dim: int = 32,
        scaled: bool = False,
        deep: Sequence[int] = (),
        tower: Sequence[int] = (),
        **shared: Unpack[PlainArguments],
    ) -> None:
        super().__init__(schema, tower=tower, **shared)
        for key, value in {"layers": layers, "heads": heads, "head_dim": head_dim}.items():
            check_count(key, value)
        num_tokens, widths = len(self.tokens.names), [self.embedding_dim] + [heads * head_dim] * (layers - 1)
        with seeded(self.seed, "interactions"):
            self.layers = nn.Sequential(
                *(InteractingLayer(width, heads, head_dim, scaled, self.dropout) for width in widths)
            )
            self.deep = MLP(num_tokens * self.embedding_dim, deep, self.activation, self.dropout) if deep else None
        self.add_towers(num_tokens * heads * head_dim + (self.deep.out_features if self.deep is not None else 0))

    def interact(self, embedded: Embedded) -> Tensor:
        """[B, H]: the tokens of the last layer side by side, and beside them the deep part of AutoInt+."""
        x = self.tokens(embedded)  # [B, m, D]
        attended: Tensor = self.layers(x).flatten(1)
        return attended if self.deep is None else torch.cat([attended, self.deep(x.flatten(1))], 1)
