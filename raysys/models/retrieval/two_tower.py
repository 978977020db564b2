"""Two-tower retrieval: an MLP over what is known of the user, another over what is known of the item, and a cosine."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raysys.errors import UserError, check_count
from raysys.models.embeddings import Embeddings
from raysys.models.outputs import Embedded
from raysys.models.retrieval.base import RetrievalModel
from raysys.models.sides import ITEM_SIDES, USER_SIDES, Side
from raysys.nn.mlp import linear
from raysys.nn.random import seeded
from raysys.schema import FeatureSchema


class TwoTower(RetrievalModel):
    """score = ⟨u, v⟩ / τ with u and v of length 1: Yi et al. (RecSys 2019), section 4.

    Tokens of users and context, histories pooled, go through one MLP, those of items through another, both of the widths
    `deep`; a linear map brings each to K = `width` columns. An index finds the largest ⟨u, v⟩: the temperature changes no
    order.

    temperature: τ, or where it starts if `learn_temperature`. The other arguments are those of `Embeddings` and
    `TokenStack`.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        embedding_dim: int = 32,
        deep: Sequence[int] = (128,),
        width: int = 64,
        bottom: Sequence[int] = (64,),
        activation: str = "relu",
        dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        sequence_pooling: str = "both",
        temperature: float = 0.07,
        learn_temperature: bool = False,
        init_scale: float | None = None,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        super().__init__()
        check_count("width", width)
        if not temperature > 0:
            raise UserError(f"temperature is {temperature}", "a number above 0 is expected, such as 0.05 to 0.1")
        self.embeddings = Embeddings(schema, embedding_dim, seed, device, init_scale, sequence_pooling != "none")
        self.width = width

        def side(name: str, sides: Sequence[str]) -> nn.Sequential:
            tower = Side(
                schema,
                name,
                sides,
                embedding_dim,
                deep=deep,
                bottom=bottom,
                activation=activation,
                pooling=sequence_pooling,
                dropout=dropout,
                embedding_dropout=embedding_dropout,
            )
            return nn.Sequential(tower, linear(tower.out_features, width, bias=False))

        with seeded(seed, "towers"):
            self.users, self.items = side("user", USER_SIDES), side("item", ITEM_SIDES)
        scale = torch.tensor(-math.log(temperature))
        if learn_temperature:
            self.log_scale = nn.Parameter(scale)
        else:
            self.register_buffer("log_scale", scale)

    def encode_users(self, embedded: Embedded) -> Tensor:
        """[R, K], of length 1."""
        return F.normalize(self.users(embedded), dim=1)

    def encode_items(self, embedded: Embedded) -> Tensor:
        """[R, K], of length 1."""
        return F.normalize(self.items(embedded), dim=1)

    def score(self, users: Tensor, items: Tensor) -> Tensor:
        """[R, C], ⟨u, v⟩ / τ."""
        return self.log_scale.exp() * (users @ items.t())

    def score_rows(self, users: Tensor, items: Tensor) -> Tensor:
        """[R], ⟨u, v⟩ / τ of pairs."""
        return self.log_scale.exp() * (users * items).sum(1)
