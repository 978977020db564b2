"""Which tables a model has, and in which of TorchRec's collections each of them lives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType

from raysys.errors import UserError
from raysys.schema import FeatureSchema, SequenceFeature, SparseFeature, Table


@dataclass(frozen=True)
class TableSet:
    """The tables of one model, or of one member of an ensemble whose tables share collections.

    prefix: begins the names of the tables; initial weights do not depend on it. The rest: see `Embeddings`.
    """

    schema: FeatureSchema
    seed: int = 0
    init_scale: float | None = None
    use_sequences: bool = True
    separate_events: bool = False
    prefix: str = ""

    def __post_init__(self) -> None:
        _check(self.schema)

    @property
    def features(self) -> list[SparseFeature | SequenceFeature]:
        """All features that look something up."""
        return [*self.schema.sparse, *(self.schema.sequence_features if self.use_sequences else ())]

    @property
    def homes(self) -> dict[str, str]:
        """The attribute of `Tables` that holds each table."""
        in_sequences = {feature.table for feature in self.schema.sequence_features} if self.use_sequences else set()
        homes: dict[str, str] = {}
        for table in self.schema.tables:
            features = self._bags_of(table)
            weighted = {feature.weights is not None for feature in features}
            if table.name in in_sequences or len(weighted) > 1 or len(_poolings(features)) > 1:
                homes[table.name] = f"ids_{table.embedding_dim}"
            elif features:
                homes[table.name] = "weighted_bags" if weighted == {True} else "bags"
        return homes

    @property
    def in_ids(self) -> set[str]:
        """The tables that return one vector per id."""
        return {table for table, home in self.homes.items() if home.startswith("ids_")}

    @property
    def id_sources(self) -> list[str]:
        """The attributes of a batch that hold ids of tables that return one vector per id."""
        users: dict[str, tuple[SparseFeature, ...] | tuple[SequenceFeature, ...]] = {
            "sparse": self.schema.unweighted,
            "weighted": self.schema.weighted,
            "sequences": self.schema.sequence_features if self.use_sequences else (),
        }
        return [name for name, features in users.items() if any(feature.table in self.in_ids for feature in features)]

    def bag_configs(self, home: str) -> list[EmbeddingBagConfig]:
        """TorchRec's configs of the tables that live in `bags` or `weighted_bags`."""
        return [
            EmbeddingBagConfig(
                name=self.prefix + table.name,
                num_embeddings=table.num_embeddings,
                embedding_dim=table.embedding_dim,
                feature_names=[feature.name for feature in self._bags_of(table)],
                pooling=PoolingType.MEAN if _poolings(self._bags_of(table)) == {"mean"} else PoolingType.SUM,
                init_fn=nn.init.zeros_,
            )
            for table in self._tables(home)
        ]

    def id_configs(self, home: str) -> list[EmbeddingConfig]:
        """TorchRec's configs of the tables that live in an `ids_<width>`."""
        return [
            EmbeddingConfig(
                name=self.prefix + table.name,
                num_embeddings=table.num_embeddings,
                embedding_dim=table.embedding_dim,
                feature_names=[feature.name for feature in self.features if feature.table == table.name],
                init_fn=nn.init.zeros_,
            )
            for table in self._tables(home)
        ]

    def _tables(self, home: str) -> list[Table]:
        homes = self.homes
        return [table for table in self.schema.tables if homes.get(table.name) == home]

    def _bags_of(self, table: Table) -> list[SparseFeature]:
        return [feature for feature in self.schema.sparse if feature.table == table.name]


def _check(schema: FeatureSchema) -> None:
    for feature in schema.weighted:
        if feature.pooling == "mean":
            raise UserError(
                f"{schema.source}: feature {feature.name!r} has weights and pooling 'mean'",
                "weighted bags are summed: set pooling to 'sum' and divide the weights by their total",
            )
    for table in schema.tables:
        # TorchRec keeps a table as a sub-module of its name.
        if "." in table.name or hasattr(nn.ModuleDict, table.name):
            raise UserError(
                f"{schema.source}: a table cannot be named {table.name!r}",
                "torch does not take it as the name of a module: rename the table",
            )


def _poolings(features: list[SparseFeature]) -> set[str]:
    """How the bags are pooled; a single id has the same sum and mean."""
    return {feature.pooling for feature in features if feature.max_length > 1}
