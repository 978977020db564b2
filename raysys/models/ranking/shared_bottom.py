"""No interaction of features but an MLP: the trunk that multi-task models are usually compared on."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from typing_extensions import Unpack

from raysys.models.outputs import Embedded
from raysys.models.ranking.base import RankingModel, SharedArguments
from raysys.nn.mlp import MLP
from raysys.nn.random import seeded
from raysys.schema import FeatureSchema


class SharedBottom(RankingModel):
    """MLP(all tokens side by side), then a tower per task (Caruana 1997); with another `head`, the input of its experts.

    deep: widths of the MLP, none for the tokens as they are. The other arguments are those of `RankingModel`.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        embedding_dim: int = 16,
        deep: Sequence[int] = (128, 64),
        tower: Sequence[int] = (16,),
        activation: str = "relu",
        dropout: float = 0.0,
        seed: int = 0,
        **shared: Unpack[SharedArguments],
    ) -> None:
        super().__init__(
            schema,
            embedding_dim=embedding_dim,
            tower=tower,
            activation=activation,
            dropout=dropout,
            seed=seed,
            **shared,
        )
        with seeded(seed, "interactions"):
            self.deep = MLP(len(self.tokens.names) * embedding_dim, deep, activation, dropout)
        self.add_towers(self.deep.out_features)

    def interact(self, embedded: Embedded) -> Tensor:
        """[B, H]."""
        shared: Tensor = self.deep(self.tokens(embedded).flatten(1))
        return shared
