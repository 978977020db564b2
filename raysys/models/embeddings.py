"""The embedding tables of a model, as TorchRec collections that a trainer can shard."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingCollection,
    get_embedding_names_by_table,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from raysys.data.batch import Batch
from raysys.models.assembly import Assembly
from raysys.models.outputs import Embedded
from raysys.models.table_sets import TableSet
from raysys.nn.random import hash64, seeded
from raysys.schema import FeatureSchema

# TorchRec's look-ups have torch tell TorchRec's developers, in every process, how to ask whether a model is traced.
logging.getLogger("torch.fx._symbolic_trace").addFilter(lambda record: "is_fx_tracing" not in record.getMessage())

Found = tuple[list[KeyedTensor], list[dict[str, JaggedTensor]], KeyedJaggedTensor | None]
"""What the bag collections and the id collections returned, and the weights of bags that are pooled by the model."""


class Tables(nn.Module):
    """The tables of one model, or of all members of an ensemble, looked up at once: a collection of each kind for all.

    A table lives in `bags` (or `weighted_bags`), where TorchRec pools, unless a sequence looks it up as well, or its bags
    differ in pooling or in having weights: then it lives in `ids_<width>`, which gives one vector per id, and is pooled by
    an `Assembly`.

    device: of the tables; "meta" makes them without memory, for a trainer that fills their shards.
    """

    def __init__(self, sets: Sequence[TableSet], device: str = "cpu") -> None:
        super().__init__()
        self.sets = tuple(sets)
        homes = {home for part in sets for home in part.homes.values()}
        self.id_collections = sorted(home for home in homes if home.startswith("ids_"))
        with seeded(sets[0].seed, "tables"):  # TorchRec draws weights for them that are overwritten
            self.bags = self._bag_collection("bags", device)
            self.weighted_bags = self._bag_collection("weighted_bags", device)
            for name in self.id_collections:
                configs = [config for part in sets for config in part.id_configs(name)]
                self.add_module(name, EmbeddingCollection(configs, device=torch.device(device)))
        wanted = {name for part in sets for name in part.id_sources}
        self.id_sources = [name for name in ("sparse", "weighted", "sequences") if name in wanted]
        self.joined_ids = JoinedIds()
        if device != "meta":
            self.initialize()

    def look_up(self, batch: Batch) -> Found:
        """One call of each collection.

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
        return pooled, ids, weighted

    def make_assembly(self, part: TableSet, embedding_dim: int, own: TableSet) -> Assembly:
        """What brings the features of a set to tokens of width `embedding_dim`, with seed and sequences as in `own`."""
        returned = {
            (config.name, feature): name
            for configs in self._configs()
            for config, names in zip(configs, get_embedding_names_by_table(configs), strict=True)
            for feature, name in zip(config.feature_names, names, strict=True)
        }
        keys = {feature.name: returned[part.prefix + feature.table, feature.name] for feature in part.features}
        with seeded(own.seed, "projections"):
            return Assembly(part.schema, embedding_dim, part.in_ids, own.use_sequences, own.separate_events, keys)

    def configs(self) -> dict[str, BaseEmbeddingConfig]:
        """TorchRec's config of each table, by table."""
        return {config.name: config for configs in self._configs() for config in configs}

    def initial(self, name: str) -> tuple[str, int, float]:
        """What decides the initial weights of a table: the name that is hashed with the seed, and the bound ± of uniform ones."""
        part = next(part for part in self.sets if name in {part.prefix + table for table in part.homes})
        table = part.schema.table(name.removeprefix(part.prefix))
        return table.name, part.seed, table.num_embeddings**-0.5 if part.init_scale is None else part.init_scale

    @torch.no_grad()
    def initialize(self) -> None:
        """Fill the tables with their initial weights; shards are filled by their trainer with `fill_initial_weights`."""
        for path, module in self.named_modules():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                name, seed, bound = self.initial(path.rpartition(".")[2])
                fill_initial_weights(module.weight, name, seed, 0, 0, module.embedding_dim, bound)

    def _bag_collection(self, home: str, device: str) -> EmbeddingBagCollection | None:
        configs = [config for part in self.sets for config in part.bag_configs(home)]
        if not configs:
            return None
        return EmbeddingBagCollection(configs, is_weighted=home == "weighted_bags", device=torch.device(device))

    def _configs(self) -> list[list[BaseEmbeddingConfig]]:
        """The configs of each collection."""
        bags = [bags.embedding_bag_configs() for bags in (self.bags, self.weighted_bags) if bags is not None]
        return bags + [getattr(self, name).embedding_configs() for name in self.id_collections]


class Embeddings(Tables):
    """All tables of a model, looked up and brought to tokens of width `embedding_dim`.

    A table whose width is not `embedding_dim` has a matrix that projects its embeddings.

    embedding_dim: the width D of a token; tables keep their own width.
    seed: of the initial weights, which depend on (seed, table, row, column) only, not on sharding.
    device: of the tables; "meta" makes them without memory, for a trainer that fills their shards.
    init_scale: initial weights are uniform in ±init_scale; None is ±1/√rows of the table, TorchRec's default.
    use_sequences: False leaves sequences out, and tables that only they use.
    separate_events: an event is the C embeddings of its columns side by side (width CD) instead of their sum.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        embedding_dim: int,
        seed: int = 0,
        device: str = "cpu",
        init_scale: float | None = None,
        use_sequences: bool = True,
        separate_events: bool = False,
    ) -> None:
        own = TableSet(schema, seed, init_scale, use_sequences, separate_events)
        super().__init__([own], device)
        self.embedding_dim = embedding_dim
        self.assembly = self.make_assembly(own, embedding_dim, own)

    def forward(self, batch: Batch) -> Embedded:
        """Tokens [B, F, D] in the order of `schema.sparse`, sequences at width D, and the dense columns."""
        return self.assembly(*self.look_up(batch), batch.dense)


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
