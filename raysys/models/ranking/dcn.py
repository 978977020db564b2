"""DCN v2: explicit feature crosses (Wang et al. 2021, arXiv 2008.13535)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchrec.modules.crossnet import CrossNet, LowRankCrossNet
from typing_extensions import Unpack

from raysys.errors import UserError, check_count, nearest
from raysys.models.outputs import Embedded
from raysys.models.ranking.base import PlainArguments, RankingModel
from raysys.nn.mlp import MLP
from raysys.nn.random import seeded
from raysys.schema import FeatureSchema

STRUCTURES = ("stacked", "parallel")


class DCNv2(RankingModel):
    """x_{l+1} = x_0 ⊙ (W_l x_l + b_l) + x_l on x_0 = all tokens side by side, with a deep MLP after or beside it.

    cross_layers: number of crosses. rank: W_l = U_l V_l^T of this rank; None is a full matrix.
    structure: stacked, MLP(cross(x)), or parallel, [cross(x) ‖ MLP(x)]; the towers follow (the default is one linear map).
    The other arguments are those of `RankingModel`.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        cross_layers: int = 3,
        rank: int | None = 64,
        structure: str = "stacked",
        deep: Sequence[int] = (256, 128, 64),
        tower: Sequence[int] = (),
        **shared: Unpack[PlainArguments],
    ) -> None:
        super().__init__(schema, tower=tower, **shared)
        if structure not in STRUCTURES:
            raise UserError(f"unknown structure {structure!r}", nearest(structure, STRUCTURES))
        check_count("cross_layers", cross_layers, 0)
        if rank is not None and rank < 1:
            raise UserError(f"rank is {rank}", "a positive number is expected, or null for full matrices")
        self.parallel = structure == "parallel"
        width = len(self.tokens.names) * self.embedding_dim
        with seeded(self.seed, "interactions"):
            self.cross = CrossNet(width, cross_layers) if rank is None else LowRankCrossNet(width, cross_layers, rank)
            self.deep = MLP(width, deep, self.activation, self.dropout)
        self.add_towers(self.deep.out_features + (width if self.parallel else 0))

    def interact(self, embedded: Embedded) -> Tensor:
        """[B, H]: the deep part, and beside it the crosses in the parallel structure."""
        x = self.tokens(embedded).flatten(1)  # [B, mD]
        crossed = self.cross(x)
        return torch.cat([crossed, self.deep(x)], 1) if self.parallel else self.deep(crossed)
