"""DeepFM: a factorisation machine beside an MLP (Guo et al. 2017, arXiv 1703.04247)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import Unpack

from raysys.models.outputs import Embedded
from raysys.models.ranking.base import PlainArguments, RankingModel
from raysys.nn.factorization import TokenScores, pairwise_products
from raysys.nn.mlp import MLP
from raysys.nn.random import seeded
from raysys.schema import FeatureSchema


class DeepFM(RankingModel):
    """[⟨w_i, x_i⟩ for each token ‖ Σ_{i<j} x_i ⊙ x_j ‖ MLP(x)], then a linear map per task (`tower` is empty).

    The paper adds three logits: first-order terms, pairwise terms and the MLP's. The linear map contains that sum (weights
    of 1 on the first two parts) and weighs every term for each task. The paper's first-order term is a weight per id; that
    would be a second table of width 1 for each table. Here it is linear in the token, so ids share nothing that embeddings
    do not share, and there is none beyond the rank of the embeddings. The paper makes an embedding of each dense column;
    here all dense columns are one token.
    deep: widths of the MLP. The other arguments are those of `RankingModel`.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        deep: Sequence[int] = (256, 128, 64),
        tower: Sequence[int] = (),
        **shared: Unpack[PlainArguments],
    ) -> None:
        super().__init__(schema, tower=tower, **shared)
        num_tokens = len(self.tokens.names)
        with seeded(self.seed, "interactions"):
            self.first_order = TokenScores(num_tokens, self.embedding_dim)
            self.deep = MLP(num_tokens * self.embedding_dim, deep, self.activation, self.dropout)
        self.add_towers(num_tokens + self.embedding_dim + self.deep.out_features)

    def interact(self, embedded: Embedded) -> Tensor:
        """[B, H]: first-order terms [m], pairwise terms by column [D], the MLP."""
        x = self.tokens(embedded)  # [B, m, D]
        return torch.cat([self.first_order(x), pairwise_products(x), self.deep(x.flatten(1))], 1)
