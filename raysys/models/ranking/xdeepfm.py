"""xDeepFM: a compressed interaction network beside an MLP (Lian et al. 2018, arXiv 1803.05170)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import Unpack

from raysys.errors import UserError
from raysys.models.outputs import Embedded
from raysys.models.ranking.base import PlainArguments, RankingModel
from raysys.nn.factorization import CompressedInteractions, TokenScores
from raysys.nn.mlp import MLP
from raysys.nn.random import seeded
from raysys.schema import FeatureSchema


class XDeepFM(RankingModel):
    """[⟨w_i, x_i⟩ for each token ‖ CIN(X) ‖ MLP(x)], then a linear map per task (`tower` is empty).

    The paper adds the logits of a linear part on raw features, the CIN and the MLP; the linear map contains that sum. The
    linear part is that of `DeepFM`: linear in the tokens, not a weight per id. All maps of a layer go to the output and to
    the next layer, as in the paper's formulas; the authors' code can split them in halves, which is not offered.
    maps: the number of maps of each layer of the CIN; layer k gives interactions of order k + 1.
    deep: widths of the MLP. The other arguments are those of `RankingModel`.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        maps: Sequence[int] = (64, 64),
        deep: Sequence[int] = (256, 128, 64),
        tower: Sequence[int] = (),
        **shared: Unpack[PlainArguments],
    ) -> None:
        super().__init__(schema, tower=tower, **shared)
        if not maps or min(maps) < 1:
            raise UserError(f"maps is {list(maps)}", "give a positive number for each layer, at least one: [64, 64]")
        num_tokens = len(self.tokens.names)
        with seeded(self.seed, "interactions"):
            self.first_order = TokenScores(num_tokens, self.embedding_dim)
            self.cin = CompressedInteractions(num_tokens, maps)
            self.deep = MLP(num_tokens * self.embedding_dim, deep, self.activation, self.dropout)
        self.add_towers(num_tokens + self.cin.out_features + self.deep.out_features)

    def interact(self, embedded: Embedded) -> Tensor:
        """[B, H]: first-order terms [m], the CIN's sums, the MLP."""
        x = self.tokens(embedded)  # [B, m, D]
        return torch.cat([self.first_order(x), self.cin(x), self.deep(x.flatten(1))], 1)
