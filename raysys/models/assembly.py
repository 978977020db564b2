"""From what the embedding tables return to `Embedded`."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from raysys.models.outputs import Embedded
from raysys.nn.jagged import length_mask, pad, pool
from raysys.schema import FeatureSchema


class Assembly(nn.Module):
    """Pools what comes as single ids, projects every width to `embedding_dim` and orders the tokens as the schema does.

    It holds no table: the tracer of TorchRec's pipelines takes it as one step.

    in_ids: the tables that return one vector per id.
    separate_events: the features of a sequence stand side by side instead of being summed.
    keys: what each feature is called in what the collections return, `feature@table` where several tables look it up.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        embedding_dim: int,
        in_ids: set[str],
        use_sequences: bool,
        separate_events: bool,
        keys: Mapping[str, str],
    ) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.separate_events = separate_events
        self.keys = dict(keys)
        self.names = tuple(feature.name for feature in schema.sparse)
        self.pooled_here = [feature for feature in schema.sparse if feature.table in in_ids]
        self.pooled_there = [feature.name for feature in schema.sparse if feature.table not in in_ids]
        self.sequences = schema.sequences if use_sequences else ()
        self.tables = {feature.name: feature.table for feature in schema.sparse}
        for sequence in self.sequences:
            self.tables |= {feature.name: feature.table for feature in sequence.features}
        used = set(self.tables.values())
        widths = {table.name: table.embedding_dim for table in schema.tables if table.name in used}
        self.projections = nn.ModuleDict()
        for width in sorted(set(widths.values()) - {embedding_dim}):
            tables = [name for name in widths if widths[name] == width]
            self.projections[str(width)] = Projection(schema, tables, width, embedding_dim)

    def forward(
        self,
        pooled: Sequence[KeyedTensor],
        ids: Sequence[dict[str, JaggedTensor]],
        weighted: KeyedJaggedTensor | None,
        dense: Tensor,
    ) -> Embedded:
        """What the bag collections and the id collections returned, and the weights of bags that are pooled here."""
        vectors = {key: jagged for collection in ids for key, jagged in collection.items()}
        return Embedded(self._tokens(pooled, vectors, weighted, dense), self.names, self._sequences(vectors), dense)

    def _tokens(
        self,
        pooled: Sequence[KeyedTensor],
        vectors: dict[str, JaggedTensor],
        weighted: KeyedJaggedTensor | None,
        dense: Tensor,
    ) -> Tensor:
        """[B, F, D]. `KeyedTensor.values()` comes in the order of the sharding plan: only where that is ours it is taken."""
        if not self.names:
            return dense.new_zeros(dense.shape[0], 0, self.embedding_dim)
        if not self.projections and not self.pooled_here and len(pooled) == 1 and tuple(pooled[0].keys()) == self.names:
            return pooled[0].values().unflatten(1, (len(self.names), self.embedding_dim))
        found = {key: column for tensor in pooled for key, column in tensor.to_dict().items()}  # [B, width] each
        columns = {name: found[self.keys[name]] for name in self.pooled_there}
        for feature in self.pooled_here:
            weights = weighted[feature.name].weights() if weighted is not None and feature.weights else None
            jagged = vectors[self.keys[feature.name]]
            columns[feature.name] = pool(jagged.values(), jagged.offsets(), weights, feature.pooling == "mean")
        for projection in self.projections.values():
            columns |= projection(columns)
        return torch.stack([columns[name] for name in self.names], 1)

    def _sequences(self, vectors: dict[str, JaggedTensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """[B, L, D] and mask [B, L] of each sequence: the sum of its C features at width D, or [B, L, CD] side by side."""
        found = {}
        for sequence in self.sequences:
            first = vectors[self.keys[sequence.features[0].name]]
            columns = [
                self._project(feature.name, vectors[self.keys[feature.name]].values())  # [N, D]
                for feature in sequence.features
            ]
            values = torch.cat(columns, 1) if self.separate_events else functools.reduce(torch.add, columns)
            padded = pad(values, first.offsets(), sequence.max_length)
            found[sequence.name] = (padded, length_mask(first.lengths(), sequence.max_length))
        return found

    def _project(self, feature: str, values: Tensor) -> Tensor:
        for projection in self.projections.values():
            assert isinstance(projection, Projection)
            if self.tables[feature] in projection.places:
                return values @ projection.weight[projection.places[self.tables[feature]]]
        return values


class Projection(nn.Module):
    """Tables of one width to the tokens' width: a matrix per table, no bias, so that an empty bag stays 0."""

    features_place: Tensor

    def __init__(self, schema: FeatureSchema, tables: list[str], width: int, embedding_dim: int) -> None:
        super().__init__()
        self.places = {table: place for place, table in enumerate(tables)}
        self.weight = nn.Parameter(torch.empty(len(tables), width, embedding_dim))
        for matrix in self.weight:
            nn.init.xavier_uniform_(matrix)
        features = [feature for feature in schema.sparse if feature.table in self.places]
        self.names = [feature.name for feature in features]
        place = torch.tensor([self.places[feature.table] for feature in features], dtype=torch.long)
        self.register_buffer("features_place", place, persistent=False)

    def forward(self, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        """[B, width] → [B, D] for each sparse feature of these tables, as one batched product."""
        if not self.names:
            return {}
        stacked = torch.stack([columns[name] for name in self.names])  # [F, B, width]
        projected = torch.bmm(stacked, self.weight.index_select(0, self.features_place))  # [F, B, D]
        return dict(zip(self.names, projected.unbind(), strict=True))
