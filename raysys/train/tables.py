"""The embedding tables of a model, the same way for a plain and for a sharded one.

A table goes by its name, or by `path.name` where several parts of a model (the members of an ensemble) have a table of
that name. The key depends on the model alone, never on the plan, so that checkpoints can be loaded under another plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import get_unwrapped_module
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from raysys.nn.collectives import communication_device

TableValue: TypeAlias = Tensor | ShardedTensor
"""A table, or its optimiser's state: whole on every rank, or in parts that the ranks hold."""

_COLLECTIONS = (
    EmbeddingBagCollection,
    EmbeddingCollection,
    ShardedEmbeddingBagCollection,
    ShardedEmbeddingCollection,
)


@dataclass(frozen=True)
class TableRef:
    """Where a table is: `path` of its collection in the model, `name` in the collection, `key` in the whole model."""

    key: str
    name: str
    path: str
    collection: nn.Module

    @property
    def parameter_name(self) -> str:
        """The name of the table's parameter within its collection."""
        kind = "embedding_bags" if hasattr(self.collection, "embedding_bags") else "embeddings"
        return f"{kind}.{self.name}.weight"

    @property
    def config(self) -> BaseEmbeddingConfig:
        """TorchRec's config of the table; for plain collections only."""
        assert isinstance(self.collection, EmbeddingBagCollection | EmbeddingCollection)
        configs: Sequence[BaseEmbeddingConfig]
        if isinstance(self.collection, EmbeddingBagCollection):
            configs = self.collection.embedding_bag_configs()
        else:
            configs = self.collection.embedding_configs()
        return next(config for config in configs if config.name == self.name)

    @property
    def parameter(self) -> nn.Parameter:
        """The table's parameter; of a sharded table, what this rank holds of it."""
        return self.collection.get_parameter(self.parameter_name)


@dataclass(frozen=True)
class TablePart:
    """The rows and columns of a table that stand on this rank; `values` is the live memory."""

    values: Tensor  # [rows, columns], or [rows] for a state with one value per row
    row_offset: int
    column_offset: int


def find_tables(model: nn.Module) -> list[TableRef]:
    """The tables of a plain or sharded model, in the order of its modules."""
    found: list[tuple[str, str, nn.Module]] = []
    for path, module in get_unwrapped_module(model).named_modules():
        if isinstance(module, _COLLECTIONS):
            tables = module.embedding_bags if hasattr(module, "embedding_bags") else module.embeddings
            found += [(path, name, module) for name in tables]
    count = Counter(name for _, name, _ in found)
    return [
        TableRef(name if count[name] == 1 else f"{path}.{name}", name, path, module) for path, name, module in found
    ]


def table_weights(model: nn.Module) -> dict[str, TableValue]:
    """All tables by key, [rows, columns]; they share memory with the model, so loading into them loads the model.

    What a GPU caches of tables in host memory is written back first. After writing through the result call
    `forget_cached_rows`.
    """
    tables = find_tables(model)
    states = {table.path: table.collection.state_dict() for table in tables}
    return {table.key: states[table.path][table.parameter_name] for table in tables}


def forget_cached_rows(model: nn.Module) -> None:
    """Drop what a GPU caches of tables in host memory, after those were overwritten."""
    for collection in {table.path: table.collection for table in find_tables(model)}.values():
        for lookup in getattr(collection, "_lookups", ()):  # TorchRec does it only within `load_state_dict`
            get_unwrapped_module(lookup).purge()


def local_parts(value: TableValue) -> Iterator[TablePart]:
    """What of a table (or state) this rank holds: nothing, one part, or several column-wise ones."""
    if not isinstance(value, ShardedTensor):
        yield TablePart(value.detach(), 0, 0)
        return
    for shard in value.local_shards():
        row_offset, column_offset = (*shard.metadata.shard_offsets, 0)[:2]
        yield TablePart(shard.tensor.detach(), row_offset, column_offset)


def gather_table(value: TableValue) -> Tensor | None:
    """The whole table on the CPU of rank 0, None on the others (collective where the table is in parts)."""
    if not isinstance(value, ShardedTensor):
        return value.detach().cpu()
    whole = torch.empty(value.metadata().size, device=communication_device()) if dist.get_rank() == 0 else None
    value.gather(dst=0, out=whole)
    return None if whole is None else whole.cpu()
