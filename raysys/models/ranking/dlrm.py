"""DLRM: dot products of all pairs of tokens (Naumov et al. 2019, arXiv 1906.00091)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raysys.models.heads import TaskTowers
from raysys.models.outputs import Embedded
from raysys.models.ranking.base import RankingModel
from raysys.nn.interactions import PairwiseDots
from raysys.nn.random import seeded
from raysys.schema import FeatureSchema


class DLRM(RankingModel):
    """z = MLP_top([x_0 ‖ ⟨x_i, x_j⟩ for i < j]), x_0 the dense token (left out of the first part where there is none).

    The top MLP is `tower`, one per task. The other arguments are those of `RankingModel`.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        embedding_dim: int = 16,
        bottom: Sequence[int] = (256, 128),
        tower: Sequence[int] = (256, 128, 64),
        activation: str = "relu",
        dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        sequence_pooling: str = "both",
        target_attention: bool = True,
        init_scale: float | None = None,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        super().__init__(
            schema,
            embedding_dim=embedding_dim,
            bottom=bottom,
            activation=activation,
            sequence_pooling=sequence_pooling,
            target_attention=target_attention,
            embedding_dropout=embedding_dropout,
            init_scale=init_scale,
            seed=seed,
            device=device,
        )
        self.dots = PairwiseDots(len(self.tokens.names))
        width = self.dots.out_features + (embedding_dim if self.tokens.dense is not None else 0)
        with seeded(seed, "towers"):
            self.towers = TaskTowers(len(schema.labels), width, tower, activation, dropout)

    def interact(self, embedded: Embedded) -> Tensor:
        """[B, H]: the dense token and the dot products."""
        tokens = self.tokens(embedded)  # [B, m, D]
        dots = self.dots(tokens)
        return dots if self.tokens.dense is None else torch.cat([tokens[:, 0], dots], 1)
