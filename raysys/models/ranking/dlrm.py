"""DLRM: dot products of all pairs of tokens (Naumov et al. 2019, arXiv 1906.00091)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import Unpack

from raysys.models.outputs import Embedded
from raysys.models.ranking.base import PlainArguments, RankingModel
from raysys.nn.interactions import PairwiseDots
from raysys.schema import FeatureSchema


class DLRM(RankingModel):
    """z = MLP_top([x_0 ‖ ⟨x_i, x_j⟩ for i < j]), x_0 the dense token (left out of the first part where there is none).

    The top MLP is `tower`, one per task. The other arguments are those of `RankingModel`.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        tower: Sequence[int] = (256, 128, 64),
        **shared: Unpack[PlainArguments],
    ) -> None:
        super().__init__(schema, tower=tower, **shared)
        self.dots = PairwiseDots(len(self.tokens.names))
        width = self.dots.out_features + (self.embedding_dim if self.tokens.dense is not None else 0)
        self.add_towers(width)

    def interact(self, embedded: Embedded) -> Tensor:
        """[B, H]: the dense token and the dot products."""
        tokens = self.tokens(embedded)  # [B, m, D]
        dots = self.dots(tokens)
        return dots if self.tokens.dense is None else torch.cat([tokens[:, 0], dots], 1)
