"""The embedding tables of a model, as TorchRec collections that a trainer can shard."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from raysys.data.batch import Batch
from raysys.errors import UserError
from raysys.models.assembly import Assembly
from raysys.models.outputs import Embedded
from raysys.nn.random import hash64, seeded
from raysys.schema import FeatureSchema, SequenceFeature, SparseFeature, Table


class Embeddings(nn.Module):
    """All tables of a model, looked up and brought to tokens of width `embedding_dim`.

    A table lives in `bags` (or `weighted_bags`), where TorchRec pools, unless a sequence looks it up as well, or its bags
    differ in pooling or in having weights: then it lives in `ids_<width>`, which gives one vector per id, and is pooled here.
    A table whose width is not `embedding_dim` has a matrix that projects its embeddings.

    embedding_dim: the width D of a token; tables keep their own width.
    seed: of the initial weights, which depend on (seed, table, row, column) only, not on sharding.
    device: of the tables; "meta" makes them without memory, for a trainer that fills their shards.
    init_scale: initial weights are uniform in ±init_scale; None is ±1/√rows of the table, TorchRec's default.
    use_sequences: False leaves sequences out, and tables that only they use.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        embedding_dim: int,
        seed: int = 0,
        device: str = "cpu",
        init_scale: float | None = None,
        use_sequences: bool = True,
    ) -> None:
        super().__init__()
        _check(schema)
        self.embedding_dim, self.seed, self.init_scale = embedding_dim, seed, init_scale
        homes = _homes(schema, use_sequences)
        with seeded(seed, "tables"):  # TorchRec draws weights for them that are overwritten
            self.bags = _bag_collection(schema, homes, "bags", device)
            self.weighted_bags = _bag_collection(schema, homes, "weighted_bags", device)
            self.id_collections = sorted({home for home in homes.values() if home.startswith("ids_")})
            for name in self.id_collections:
                self.add_module(name, _id_collection(schema, homes, name, device, use_sequences))
        in_ids = {table for table, home in homes.items() if home.startswith("ids_")}
        self.id_sources = _id_sources(schema, in_ids, use_sequences)
        self.joined_ids = JoinedIds()
        with seeded(seed, "projections"):
            self.assembly = Assembly(schema, embedding_dim, in_ids, use_sequences)
        if device != "meta":
            self.initialize()

    def forward(self, batch: Batch) -> Embedded:
        """Tokens [B, F, D] in the order of `schema.sparse`, sequences at width D, and the dense columns.

        TorchRec's pipelines trace this: besides calls of modules on the batch's attributes nothing may depend on the batch.
        """
        pooled, ids, weighted = [], [], None
        if self.bags is not None:
            pooled.append(self.bags(batch.sparse))
        if self.weighted_bags is not None:
            pooled.append(self.weighted_bags(batch.weighted))
        if self.id_collections:
            sources = [getattr(batch, name) for name in self.id_sources]
            joined = sources[0] if len(sources) == 1 else self.joined_ids(*sources)
            ids = [getattr(self, name)(joined) for name in self.id_collections]
            weighted = batch.weighted if "weighted" in self.id_sources else None
        return self.assembly(pooled, ids, weighted, batch.dense)

    def configs(self) -> dict[str, BaseEmbeddingConfig]:
        """TorchRec's config of each table, by table."""
        found: list[BaseEmbeddingConfig] = []
        for bags in (self.bags, self.weighted_bags):
            found += bags.embedding_bag_configs() if bags is not None else []
        for name in self.id_collections:
            found += getattr(self, name).embedding_configs()
        return {config.name: config for config in found}

    def bound(self, table: str) -> float:
        """The initial weights of a table are uniform in ± this."""
        return self.configs()[table].num_embeddings ** -0.5 if self.init_scale is None else self.init_scale

    @torch.no_grad()
    def initialize(self) -> None:
        """Fill the tables with their initial weights; shards are filled by their trainer with `fill_initial_weights`."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                table = name.rpartition(".")[2]
                fill_initial_weights(module.weight, table, self.seed, 0, 0, module.embedding_dim, self.bound(table))


class JoinedIds(nn.Module):
    """Bags and sequences in one `KeyedJaggedTensor`. A module of its own, without parameters: pipelines run it early."""

    def forward(self, *sources: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """All keys one after another, without weights."""
        return KeyedJaggedTensor.concat(
            [KeyedJaggedTensor(source.keys(), source.values(), lengths=source.lengths()) for source in sources]
        )


_CHUNK = {"cpu": 1 << 16}  # elements at a time: the temporaries (8 bytes each) stay in a core's cache


def fill_initial_weights(
    weight: Tensor,
    table: str,
    seed: int,
    row_offset: int,
    column_offset: int,
    num_columns: int,
    bound: float,
) -> None:
    """Fill a shard of a table, `weight [rows, columns]`, with its part of the initial weights, uniform in ±bound.

    Weight (r, c) of the full table is a hash of (seed, table, r, c) (splitmix64), so every sharding plan gives the same table.
    row_offset, column_offset: where the shard begins in the full table of `num_columns` columns.
    """
    rows, columns = weight.shape
    key = hash64(f"{seed}/{table}")
    chunk = max(1, _CHUNK.get(weight.device.type, 1 << 24) // columns)
    column = torch.arange(column_offset, column_offset + columns, device=weight.device)
    for start in range(0, rows, chunk):
        stop = min(start + chunk, rows)
        row = torch.arange(row_offset + start, row_offset + stop, device=weight.device)
        hashed = _splitmix64(row[:, None] * num_columns + column, key)
        # 24 bits: 2k + 1 is exact in float32, symmetric around 0, and the product is rounded once on every device.
        uniform = (hashed >> 40).mul_(2).add_(1).to(torch.float32).mul_(bound * 2.0**-24)
        weight[start:stop].copy_(uniform)


def _splitmix64(counter: Tensor, key: int) -> Tensor:
    """The counter-th number of the splitmix64 stream that starts at `key`, int64 that wraps around, in place."""
    z = counter.mul_(_signed(0x9E3779B97F4A7C15)).add_(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z.bitwise_xor_((z >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(_signed(factor))
    return z.bitwise_xor_((z >> 31).bitwise_and_((1 << 33) - 1))


def _signed(number: int) -> int:
    """The same 64 bits as a signed number."""
    return number - (1 << 64) if number >= 1 << 63 else number


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


def _homes(schema: FeatureSchema, use_sequences: bool) -> dict[str, str]:
    """The attribute of `Embeddings` that holds each table."""
    in_sequences = {feature.table for feature in schema.sequence_features} if use_sequences else set()
    homes: dict[str, str] = {}
    for table in schema.tables:
        features = [feature for feature in schema.sparse if feature.table == table.name]
        weighted = {feature.weights is not None for feature in features}
        if table.name in in_sequences or len(weighted) > 1 or len(_poolings(features)) > 1:
            homes[table.name] = f"ids_{table.embedding_dim}"
        elif features:
            homes[table.name] = "weighted_bags" if weighted == {True} else "bags"
    return homes


def _poolings(features: list[SparseFeature]) -> set[str]:
    """How the bags are pooled; a single id has the same sum and mean."""
    return {feature.pooling for feature in features if feature.max_length > 1}


def _tables(schema: FeatureSchema, homes: dict[str, str], home: str) -> list[Table]:
    return [table for table in schema.tables if homes.get(table.name) == home]


def _bag_collection(
    schema: FeatureSchema, homes: dict[str, str], home: str, device: str
) -> EmbeddingBagCollection | None:
    configs = []
    for table in _tables(schema, homes, home):
        features = [feature for feature in schema.sparse if feature.table == table.name]
        configs.append(
            EmbeddingBagConfig(
                name=table.name,
                num_embeddings=table.num_embeddings,
                embedding_dim=table.embedding_dim,
                feature_names=[feature.name for feature in features],
                pooling=PoolingType.MEAN if _poolings(features) == {"mean"} else PoolingType.SUM,
                init_fn=nn.init.zeros_,
            )
        )
    if not configs:
        return None
    return EmbeddingBagCollection(configs, is_weighted=home == "weighted_bags", device=torch.device(device))


def _id_collection(
    schema: FeatureSchema, homes: dict[str, str], home: str, device: str, use_sequences: bool
) -> EmbeddingCollection:
    features: list[SparseFeature | SequenceFeature] = list(schema.sparse)
    features += schema.sequence_features if use_sequences else ()
    configs = [
        EmbeddingConfig(
            name=table.name,
            num_embeddings=table.num_embeddings,
            embedding_dim=table.embedding_dim,
            feature_names=[feature.name for feature in features if feature.table == table.name],
            init_fn=nn.init.zeros_,
        )
        for table in _tables(schema, homes, home)
    ]
    return EmbeddingCollection(configs, device=torch.device(device))


def _id_sources(schema: FeatureSchema, in_ids: set[str], use_sequences: bool) -> list[str]:
    """The attributes of a batch that hold ids of these tables."""
    users: dict[str, tuple[SparseFeature, ...] | tuple[SequenceFeature, ...]] = {
        "sparse": schema.unweighted,
        "weighted": schema.weighted,
        "sequences": schema.sequence_features if use_sequences else (),
    }
    return [name for name, features in users.items() if any(feature.table in in_ids for feature in features)]
