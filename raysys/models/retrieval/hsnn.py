"""HSNN: a ranking-grade network that retrieves, because it scores the nodes of a learned hierarchy before their items."""

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
from raysys.nn.mlp import MLP, activation, linear
from raysys.nn.random import seeded
from raysys.nn.residual_nodes import ResidualNodes
from raysys.schema import FeatureSchema

_SCALE = 10.0  # where the factor of the cosine starts


class HSNN(RetrievalModel):
    """Towers for users and items and a network over each pair, and for the levels of the hierarchy networks of their own.

    The modular network of Rangadurai et al. (2025, arXiv 2408.06653): user tower once a request, item tower once a catalogue,
    an interaction part for each pair. Here the interaction is of the two vectors, `PairScorer` (DeepFM's form); every level has
    its own small one and the towers are shared (ours). An item is also a path through `nodes`, whose pseudo-items take its
    place on the way down.

    nodes: learned nodes by level, coarse first. hidden: widths of the scorers' MLPs. The other arguments are those of
    `TwoTower`.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        nodes: Sequence[int] = (64, 16),
        embedding_dim: int = 32,
        deep: Sequence[int] = (128,),
        width: int = 64,
        hidden: Sequence[int] = (64,),
        bottom: Sequence[int] = (64,),
        activation: str = "relu",
        dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        sequence_pooling: str = "both",
        init_scale: float | None = None,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        super().__init__()
        check_count("width", width)
        self.embeddings = Embeddings(schema, embedding_dim, seed, device, init_scale, sequence_pooling != "none")
        if not hidden:
            raise UserError("hidden is []", "the network over a pair needs a layer, such as [64]")
        self.width, self.pair_width = width, max(hidden)

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
        with seeded(seed, "scorers"):
            self.scorers = nn.ModuleList(PairScorer(width, hidden, activation, dropout) for _ in range(len(nodes) + 1))
        self.quantizer = ResidualNodes(nodes, width)

    def encode_users(self, embedded: Embedded) -> Tensor:
        """[R, K], of length 1."""
        return F.normalize(self.users(embedded), dim=1)

    def encode_items(self, embedded: Embedded) -> Tensor:
        """[R, K], of length 1."""
        return F.normalize(self.items(embedded), dim=1)

    def score(self, users: Tensor, items: Tensor) -> Tensor:
        """[R, C], the network's score of every pair."""
        return self.score_level(users, items, 0)

    def score_level(self, users: Tensor, items: Tensor, level: int) -> Tensor:
        """[R, C]: level 0 is of items, level l of the pseudo-items [C, K] of level l. Scores of two levels do not compare."""
        scores: Tensor = self.scorers[level](users, items)
        return scores

    def score_own(self, users: Tensor, items: Tensor, level: int) -> Tensor:
        """[R, C] for candidates [R, C, K] that each user has for itself."""
        scorer = self.scorers[level]
        assert isinstance(scorer, PairScorer)
        return scorer.own(users, items)

    def score_rows(self, users: Tensor, items: Tensor) -> Tensor:
        """[R] scores of pairs."""
        return self.score_own(users, items[:, None], 0)[:, 0]


class PairScorer(nn.Module):
    """s ⟨u, v⟩ + MLP(W_u u + W_v v + W_x (u ∘ v)): the factorisation term and the deep part of DeepFM on two vectors.

    The first layer is written out so that W_u u and W_v v are computed once for each user and item.
    """

    def __init__(self, width: int, hidden: Sequence[int], activation_name: str, dropout: float) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(_SCALE)))
        first = hidden[0]
        self.of_user, self.of_item = linear(width, first), linear(width, first, bias=False)
        self.of_both = linear(width, first, bias=False)
        rest = MLP(first, hidden[1:], activation_name, dropout)
        self.deep = nn.Sequential(activation(activation_name), nn.Dropout(dropout), rest)
        self.output = linear(rest.out_features, 1, bias=False)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Users [R, K], items [C, K] that all of them share → [R, C]."""
        weight = users[:, None] * self.of_both.weight  # [R, H, K]
        both = (weight.flatten(0, 1) @ items.t()).unflatten(0, weight.shape[:2])  # [R, H, C]
        first = both + self.of_user(users)[:, :, None] + self.of_item(items).t()
        deep = self.output(self.deep(first.transpose(1, 2)))[:, :, 0]
        return self.log_scale.exp() * (users @ items.t()) + deep

    def own(self, users: Tensor, items: Tensor) -> Tensor:
        """Users [R, K], each with its own items [R, C, K] → [R, C]."""
        first = self.of_both(users[:, None] * items) + self.of_user(users)[:, None] + self.of_item(items)
        deep = self.output(self.deep(first))[:, :, 0]
        return self.log_scale.exp() * torch.bmm(items, users[:, :, None])[:, :, 0] + deep
