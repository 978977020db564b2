"""All features of a row as one token matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raysys.errors import UserError, nearest
from raysys.models.outputs import Embedded
from raysys.nn.mlp import MLP, linear
from raysys.nn.pooling import AttentionPool, mean_pool
from raysys.schema import FeatureSchema
from raysys.schema import Sequence as SequenceSchema

POOLINGS = ("mean", "attention", "both", "none")


class TokenStack(nn.Module):
    """The dense token (or several, after `split_dense`), one token per sparse feature, then the pooled sequences.

    names: what each token is; their order belongs to a checkpoint.
    bottom: hidden widths of the MLP that makes the dense token from the dense columns.
    sequence_pooling: mean | attention | both | none (sequences are left out).
    target_attention: attend with the item that is scored, the sum of the item features whose tables the sequence uses.
    dropout: of the elements of the tokens.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        dim: int,
        *,
        bottom: Sequence[int],
        activation: str,
        sequence_pooling: str,
        target_attention: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.dim = dim
        if sequence_pooling not in POOLINGS:
            raise UserError(f"unknown sequence_pooling {sequence_pooling!r}", nearest(sequence_pooling, POOLINGS))
        names = [feature.name for feature in schema.sparse]
        self.dense = None
        if schema.dense_width:
            mlp = MLP(schema.dense_width, bottom, activation)
            self.dense = nn.Sequential(mlp, linear(mlp.out_features, dim))
            names = ["dense", *names]
        self.sequences = [sequence.name for sequence in schema.sequences] if sequence_pooling != "none" else []
        self.mean = sequence_pooling in ("mean", "both")
        self.attention = nn.ModuleList()
        self.targets: list[list[int]] = []
        for sequence in schema.sequences:
            names += [f"{sequence.name}.mean"] if self.mean else []
            if sequence_pooling in ("attention", "both"):
                names.append(f"{sequence.name}.attention")
                self.targets.append(_target_tokens(schema, sequence) if target_attention else [])
                self.attention.append(AttentionPool(dim, with_target=bool(self.targets[-1])))
        if not names:
            hint = "set sequence_pooling=mean: with 'none' a history makes no token" if schema.sequences else None
            raise UserError(f"{schema.source}: no dense, sparse or sequence feature that the model can use", hint)
        self.names = tuple(names)
        self.dropout = nn.Dropout(dropout)

    def split_dense(self, count: int) -> None:
        """Make `count` tokens of the dense columns instead of one: for a constructor, the last map is drawn anew."""
        if self.dense is not None and count > 1:
            last = self.dense[-1]
            assert isinstance(last, nn.Linear)
            self.dense[-1] = linear(last.in_features, count * self.dim)
            self.names = (*(f"dense.{number}" for number in range(count)), *self.names[1:])

    def forward(self, embedded: Embedded) -> Tensor:
        """[B, m, D], m = len(names)."""
        tokens = [] if self.dense is None else [self.dense(embedded.dense).unflatten(1, (-1, self.dim))]
        tokens.append(embedded.tokens)
        for place, name in enumerate(self.sequences):
            sequence, mask = embedded.sequences[name]
            if sequence.shape[2] != self.dim:
                sequence = sequence.unflatten(2, (-1, self.dim)).sum(2)  # its columns came side by side
            if self.mean:
                tokens.append(mean_pool(sequence, mask)[:, None])
            if self.attention:
                target = _sum_of(embedded.tokens, self.targets[place])
                tokens.append(self.attention[place](sequence, mask, target)[:, None])
        return self.dropout(torch.cat(tokens, 1) if len(tokens) > 1 else tokens[0])


def _sum_of(tokens: Tensor, places: list[int]) -> Tensor | None:
    """[B, F, D] → [B, D], None where there are no places."""
    return torch.stack([tokens[:, place] for place in places]).sum(0) if places else None


def _target_tokens(schema: FeatureSchema, sequence: SequenceSchema) -> list[int]:
    """The places in `schema.sparse` of the item features whose tables the sequence uses."""
    tables = {feature.table for feature in sequence.features}
    return [place for place, feature in enumerate(schema.sparse) if feature.side == "item" and feature.table in tables]
