"""One side of a row alone: users and context, or items, for models in which they meet late."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raysys.errors import UserError
from raysys.models.outputs import Embedded
from raysys.models.tokens import TokenStack
from raysys.nn.mlp import MLP
from raysys.schema import FeatureSchema

USER_SIDES = ("user", "context")
ITEM_SIDES = ("item",)


class Side(nn.Module):
    """What one side knows of a row as one vector: its tokens, then an MLP of the widths `deep`.

    sides: whose features are read. name: what an error calls them. pooling: of histories. The other arguments are those of
    `TokenStack` and `MLP`.
    """

    places: Tensor
    columns: Tensor

    def __init__(
        self,
        schema: FeatureSchema,
        name: str,
        sides: Sequence[str],
        dim: int,
        *,
        deep: Sequence[int],
        bottom: Sequence[int],
        activation: str,
        pooling: str,
        dropout: float,
        embedding_dropout: float,
    ) -> None:
        super().__init__()
        part = schema_part(schema, name, sides)
        self.stack = TokenStack(
            part,
            dim,
            bottom=bottom,
            activation=activation,
            sequence_pooling=pooling,
            target_attention=False,
            dropout=embedding_dropout,
        )
        self.deep = MLP(len(self.stack.names) * dim, deep, activation, dropout)
        self.out_features = self.deep.out_features
        names = [feature.name for feature in schema.sparse]
        flags = [feature.name for feature in schema.dense if feature.missing_flag]
        dense = [feature.name for feature in schema.dense]
        columns = [dense.index(feature.name) for feature in part.dense]
        columns += [len(dense) + flags.index(feature.name) for feature in part.dense if feature.missing_flag]
        places = [names.index(feature.name) for feature in part.sparse]
        self.register_buffer("places", torch.tensor(places, dtype=torch.int64), persistent=False)
        self.register_buffer("columns", torch.tensor(columns, dtype=torch.int64), persistent=False)

    def forward(self, embedded: Embedded) -> Tensor:
        """[B, H]."""
        own = dataclasses.replace(
            embedded,
            tokens=embedded.tokens.index_select(1, self.places),
            dense=embedded.dense.index_select(1, self.columns),
        )
        shared: Tensor = self.deep(self.stack(own).flatten(1))
        return shared


def schema_part(schema: FeatureSchema, name: str, sides: Sequence[str]) -> FeatureSchema:
    """The schema with the features of these sides alone."""
    sparse = tuple(feature for feature in schema.sparse if feature.side in sides)
    dense = tuple(feature for feature in schema.dense if feature.side in sides)
    sequences = tuple(sequence for sequence in schema.sequences if sequence.side in sides)
    if not sparse and not dense and not sequences:
        raise UserError(f"{schema.source}: the model needs a feature of the {name}", f"give one `side: {sides[0]}`")
    used = {feature.table for feature in sparse}
    used |= {feature.table for sequence in sequences for feature in sequence.features}
    tables = tuple(table for table in schema.tables if table.name in used)
    return dataclasses.replace(schema, tables=tables, sparse=sparse, dense=dense, sequences=sequences)
