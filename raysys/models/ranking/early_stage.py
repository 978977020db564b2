"""A cheap model for the early stage of ranking: what is known of users and of items meets in a dot product only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import TypedDict, Unpack

from raysys.errors import UserError
from raysys.models.heads import Head
from raysys.models.multitask.esmm import ESMM
from raysys.models.outputs import Embedded, Output
from raysys.models.ranking.base import RankingModel
from raysys.models.sides import ITEM_SIDES, USER_SIDES, Side
from raysys.nn.mlp import ParallelLinear
from raysys.nn.random import seeded
from raysys.schema import FeatureSchema


class EarlyStageArguments(TypedDict, total=False):
    """`SharedArguments` that the model does not name."""

    init_scale: float | None
    head: Head | None
    device: str


class Encoded(NamedTuple):
    """One side of R rows: a vector and a bias for each of T tasks, [R, T, K] and [R, T]; plain tensors that can be kept."""

    vectors: Tensor
    biases: Tensor


class EarlyStage(RankingModel):
    """logit_t = ⟨U_t, A_t⟩ / √K + b_t(user) + c_t(item): two towers, and on each side a head that relates the tasks.

    The tokens of users and context go through one MLP, those of items through another, both of the widths `deep`. On each
    side `head` (towers, mmoe, ple, adatt, …) gives a vector for each task, which a linear map per task brings to K = `width`
    columns; the head's own logits are the biases. b_t changes no order within a request, but lets probabilities be
    calibrated. Features of side `position` are not read: the early stage does not know them.

    Serving: `encode_items` where the model or the items change, `encode_users` once a request, and `score` costs T K
    multiply-adds a candidate. So no history attends to the item (`target_attention`), and a head whose logits are no
    biases (esmm) is refused.

    The problem is that of Wang et al. (2023, arXiv 2307.11096), of which only the abstract was seen: towers, blocks and
    defaults are ours. The other arguments are those of `RankingModel`; `tower` is the heads'.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        embedding_dim: int = 16,
        deep: Sequence[int] = (256,),
        width: int = 32,
        bottom: Sequence[int] = (256, 128),
        tower: Sequence[int] = (),
        activation: str = "relu",
        dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        sequence_pooling: str = "both",
        target_attention: bool = False,
        seed: int = 0,
        **shared: Unpack[EarlyStageArguments],
    ) -> None:
        if target_attention:
            raise UserError("EarlyStage: target_attention is true", "a user is encoded before the items are known")
        if width < 1:
            raise UserError(f"EarlyStage: width is {width}", "a positive whole number is expected")
        super().__init__(
            schema,
            embedding_dim=embedding_dim,
            bottom=bottom,
            tower=tower,
            activation=activation,
            dropout=dropout,
            embedding_dropout=embedding_dropout,
            sequence_pooling=sequence_pooling,
            target_attention=False,
            seed=seed,
            **shared,
        )
        del self.tokens  # of all features together: each side has its own
        self.width = width

        def side(name: str, sides: Sequence[str]) -> Side:
            return Side(
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

        with seeded(seed, "interactions"):
            self.users, self.items = side("user", USER_SIDES), side("item", ITEM_SIDES)
        self.widths = [self.users.out_features, self.items.out_features]
        self.add_towers(sum(self.widths))

    def add_towers(self, width: int) -> None:
        """A block for each side, in the place of the one head of other models."""
        self.shared_width = width
        with seeded(self.seed, "towers"):
            self.towers = nn.ModuleList(TaskVectors(self._head, inputs, self.width) for inputs in self.widths)

    def _blocks(self) -> tuple[nn.Module, nn.Module]:
        assert isinstance(self.towers, nn.ModuleList)
        return self.towers[0], self.towers[1]

    def interact(self, embedded: Embedded) -> Tensor:
        """[B, H]: the user's representation and the item's side by side."""
        return torch.cat([self.users(embedded), self.items(embedded)], 1)

    def predict(self, shared: Tensor) -> Output:
        """Logits [B, T]; `hidden` [B, T, K] are the products that a logit sums up."""
        user, item = (block(half) for block, half in zip(self._blocks(), shared.split(self.widths, 1), strict=True))
        products = user.vectors * item.vectors / math.sqrt(self.width)  # [B, T, K]
        return Output(logits=products.sum(2) + user.biases + item.biases, shared=shared, hidden=products)

    def encode_users(self, embedded: Embedded) -> Encoded:
        """The user's side of each row. What the row says of an item is not read."""
        encoded: Encoded = self._blocks()[0](self.users(embedded))
        return encoded

    def encode_items(self, embedded: Embedded) -> Encoded:
        """The item's side of each row. What the row says of a user or a context is not read."""
        encoded: Encoded = self._blocks()[1](self.items(embedded))
        return encoded

    def score(self, users: Encoded, items: Encoded) -> Tensor:
        """Logits [R, T, C] of C items for each of R users, equal to those of a row that has both."""
        product = torch.einsum("rtk,ctk->rtc", users.vectors, items.vectors) / math.sqrt(self.width)
        return product + users.biases[:, :, None] + items.biases.t()


class TaskVectors(nn.Module):
    """A head's last layers, mapped to K columns by a linear map per task, and its logits.

    make_head: gives the head for a number of inputs.
    """

    def __init__(self, make_head: Callable[..., nn.Module], inputs: int, width: int) -> None:
        super().__init__()
        self.head = make_head(inputs=inputs)
        if isinstance(self.head, ESMM):
            raise UserError(
                "EarlyStage: model/head=esmm gives the logit of a product", "choose towers, mmoe, ple or adatt"
            )
        self.head.eval()
        with torch.no_grad():
            hidden = self.head(torch.zeros(1, inputs)).hidden  # [1, T, H']
        self.head.train()
        self.maps = ParallelLinear(hidden.shape[1], hidden.shape[2], width)

    def forward(self, shared: Tensor) -> Encoded:
        """[R, inputs] → [R, T, K] and [R, T]."""
        output: Output = self.head(shared)
        return Encoded(self.maps(output.hidden.transpose(0, 1)).transpose(0, 1), output.logits)
