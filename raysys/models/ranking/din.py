"""DIN: the history is weighed by the item that is scored (Zhou et al. 2018, arXiv 1706.06978)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from raysys.errors import UserError
from raysys.models.outputs import Embedded
from raysys.models.ranking.base import RankingModel, SequenceModelArguments
from raysys.nn.mlp import activation as activation_of
from raysys.nn.mlp import linear
from raysys.nn.random import seeded
from raysys.schema import FeatureSchema
from raysys.schema import Sequence as SequenceSchema


class Dice(nn.Module):
    """p s + alpha (1 - p) s with p = sigmoid((s - mean) / deviation) for each column; alpha is learned and starts at 0.

    In training mean and variance are those of the batch (on this worker), afterwards running ones, as in a batch norm.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, width: int, momentum: float = 0.1, eps: float = 1e-8) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(width))
        self.momentum, self.eps = momentum, eps
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    def forward(self, s: Tensor, mask: Tensor | None = None) -> Tensor:
        """[..., W] → [..., W]; mask [...]: what counts in the statistics."""
        mean, variance = self._statistics(s.float(), mask) if self.training else (self.mean, self.variance)
        p = ((s.float() - mean) * (variance + self.eps).rsqrt()).sigmoid().to(s.dtype)
        return s * (p + self.alpha * (1 - p))

    def _statistics(self, s: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and variance [W] of this batch, which are also mixed into the running ones; those where nothing counts."""
        flat = s.flatten(0, -2)  # [N, W]
        weight = flat.new_ones(len(flat), 1) if mask is None else mask.flatten()[:, None].to(flat.dtype)
        count = weight.sum()
        some = count > 0
        share = weight / count.clamp(min=1)
        mean = (flat * share).sum(0)
        variance = ((flat - mean).square() * share).sum(0)
        with torch.no_grad():
            for running, new in ((self.mean, mean), (self.variance, variance)):
                running.lerp_(torch.where(some, new.detach(), running), self.momentum)
        return torch.where(some, mean, self.mean), torch.where(some, variance, self.variance)


class DiceMLP(nn.Module):
    """An `MLP` whose activation may be Dice, which needs the width and, for padded events, the mask."""

    def __init__(self, inputs: int, widths: Sequence[int], activation: str, dice: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.maps = nn.ModuleList(linear(*pair) for pair in itertools.pairwise([inputs, *widths]))
        self.activations = nn.ModuleList(Dice(width) if dice else activation_of(activation) for width in widths)
        self.dropout = nn.Dropout(dropout)
        self.out_features = widths[-1] if widths else inputs

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[..., inputs] → [..., widths[-1]]; mask [...]: what counts in Dice's statistics."""
        for layer, activation in zip(self.maps, self.activations, strict=True):
            s = layer(x)
            x = self.dropout(activation(s, mask) if isinstance(activation, Dice) else activation(s))
        return x


class TargetAttention(nn.Module):
    """v = Σ_t e_t h_t with e_t = MLP([a ‖ h_t ‖ a - h_t ‖ a ⊙ h_t]), by default without a softmax over t.

    a: the item features whose tables the sequence uses, side by side (the sum of those that share a table); in the MLP h_t
    are the columns of the event that use these tables, side by side in the same order, then its other columns. In v they are
    all columns.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        sequence: SequenceSchema,
        dim: int,
        hidden: Sequence[int],
        activation: str,
        *,
        dice: bool,
        softmax: bool,
    ) -> None:
        super().__init__()
        self.name, self.dim, self.softmax = sequence.name, dim, softmax
        tables = [feature.table for feature in sequence.features]
        places = {table: _target_places(schema, table) for table in tables}
        self.paired = [column for column, table in enumerate(tables) if places[table]]
        self.others = [column for column, table in enumerate(tables) if not places[table]]
        self.targets = [places[tables[column]] for column in self.paired]
        if not self.paired:
            raise UserError(
                f"{schema.source}: DIN needs an item feature that shares a table with sequence {sequence.name!r}",
                f"give a sparse feature of side item one of its tables: {', '.join(tables)}",
            )
        self.mlp = DiceMLP((4 * len(self.paired) + len(self.others)) * dim, hidden, activation, dice)
        self.score = linear(self.mlp.out_features, 1)

    def forward(self, embedded: Embedded) -> Tensor:
        """[B, CD] of the sequence's C columns, zeros for an empty history."""
        events, mask = embedded.sequences[self.name]  # [B, L, CD]
        columns = events.unflatten(2, (-1, self.dim))  # [B, L, C, D]
        history = columns[:, :, self.paired].flatten(2)
        target = torch.cat([embedded.tokens[:, places].sum(1) for places in self.targets], 1)  # [B, PD]
        target = target[:, None].expand_as(history)
        parts = [target, history, target - history, target * history]
        parts += [columns[:, :, self.others].flatten(2)] if self.others else []
        scores = self.score(self.mlp(torch.cat(parts, 2), mask))[:, :, 0]  # [B, L]
        if self.softmax:  # over the smallest number, not -inf: a row without events must give 0, not NaN
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(1)
        weights = scores.masked_fill(~mask, 0.0)
        # Padded events are left out even where they are not finite.
        return torch.bmm(weights[:, None], events.masked_fill(~mask[:, :, None], 0.0).to(weights.dtype))[:, 0]


class DIN(RankingModel):
    """MLP([v of each sequence ‖ all tokens]), then a tower per task; v is what `TargetAttention` makes of a sequence.

    attention: widths of its MLP, which ends in one number per event. softmax: its numbers are normalised over the events.
    deep: widths of the MLP. dice: Dice instead of `activation` in both of them; its statistics in training count the padding
    rows of a batch in `deep`, but no padded events. sequence_pooling: pooled histories as tokens as well.
    The other arguments are those of `RankingModel`.
    """

    reads_sequences = True
    separates_events = True

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        embedding_dim: int = 16,
        attention: Sequence[int] = (64,),
        softmax: bool = False,
        deep: Sequence[int] = (512, 128, 64),
        dice: bool = False,
        tower: Sequence[int] = (),
        activation: str = "relu",
        dropout: float = 0.0,
        sequence_pooling: str = "none",
        **shared: Unpack[SequenceModelArguments],
    ) -> None:
        super().__init__(
            schema,
            embedding_dim=embedding_dim,
            tower=tower,
            activation=activation,
            dropout=dropout,
            sequence_pooling=sequence_pooling,
            **shared,
        )
        with seeded(self.seed, "interactions"):
            self.histories = nn.ModuleList(
                TargetAttention(schema, sequence, embedding_dim, attention, activation, dice=dice, softmax=softmax)
                for sequence in schema.sequences
            )
            num_vectors = len(self.tokens.names) + len(schema.sequence_features)
            self.deep = DiceMLP(num_vectors * embedding_dim, deep, activation, dice, dropout)
        self.add_towers(self.deep.out_features)

    def interact(self, embedded: Embedded) -> Tensor:
        """[B, H]: the last layer of the MLP."""
        vectors = [history(embedded) for history in self.histories]
        shared: Tensor = self.deep(torch.cat([*vectors, self.tokens(embedded).flatten(1)], 1))
        return shared


def _target_places(schema: FeatureSchema, table: str) -> list[int]:
    """The places in `schema.sparse` of the item features that look up this table."""
    return [place for place, feature in enumerate(schema.sparse) if feature.side == "item" and feature.table == table]
