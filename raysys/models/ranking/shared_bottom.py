"""No interaction of features but an MLP: the trunk that multi-task models are usually compared on."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from typing_extensions import Unpack

from raysys.models.outputs import Embedded
from raysys.models.ranking.base import PlainArguments, RankingModel
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
        deep: Sequence[int] = (128, 64),
        tower: Sequence[int] = (16,),
        **shared: Unpack[PlainArguments],
    ) -> None:
        super().__init__(schema, tower=tower, **shared)
        with seeded(self.seed, "interactions"):
            self.deep = MLP(len(self.tokens.names) * self.embedding_dim, deep, self.activation, self.dropout)
        self.add_towers(self.deep.out_features)

    def interact(self, embedded: Embedded) -> Tensor:
        """[B, H]."""
        shared: Tensor = self.deep(self.tokens(embedded).flatten(1))
        return shared
