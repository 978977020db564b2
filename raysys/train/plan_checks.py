"""What a table may become: wrong names and impossible combinations end here, with the key to change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil

from pydantic import NonNegativeFloat, PositiveInt
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, ShardingType
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import ModuleSharder
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from raysys.errors import UserError, nearest
from raysys.train.sparse_optimizers import SparseOptimizer

KEY = "train.sharding"
_COLUMN_TYPES = ("column_wise", "table_column_wise", "grid_shard")
_ROW_TYPES = ("row_wise", "table_row_wise", "grid_shard")
_COLUMN_STEP = 4  # fbgemm's kernels take widths that are multiples of 4


@dataclass(frozen=True)
class TableSharding:
    """What one table may become; empty means: what the planner may choose for any table.

    min_partition: the fewest columns of a column-wise part (4, 8, ... and a divisor of the table's width); by default as
    many as give each worker one part. pooling_factors: the mean number of ids in a row of the log, for each feature.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    sharding_types: tuple[str, ...] = ()
    compute_kernels: tuple[str, ...] = ()
    min_partition: PositiveInt | None = None
    pooling_factors: tuple[NonNegativeFloat, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """A table to be planned, with the sharder of its collection."""

    config: BaseEmbeddingConfig
    sharder: ModuleSharder[nn.Module]
    device: str
    world_size: int
    local_world_size: int
    optimizer: SparseOptimizer

    def constraints(self, wish: TableSharding, default_types: Iterable[str]) -> ParameterConstraints:
        """What the planner may do with this table. Raises UserError where a wish cannot be met."""
        features = len(self.config.feature_names)
        if len(wish.pooling_factors) not in (0, features):
            raise UserError(
                f"{self._key('pooling_factors')} has {len(wish.pooling_factors)} values, the table has {features} features",
                f"one for each of: {', '.join(self.config.feature_names)}",
            )
        types = self._wished_types(wish) or [kind for kind in default_types if self._objection(kind, wish) is None]
        if not types:
            kind = next(iter(default_types))
            what, hint = self._objection(kind, wish) or ("", "")
            raise UserError(f"{KEY}.sharding_types leaves nothing for table {self.config.name!r}: {what}", hint)
        return ParameterConstraints(
            sharding_types=types,
            compute_kernels=self._kernels(wish, types),
            min_partition=self._part_columns(wish),
            pooling_factors=list(wish.pooling_factors) or [1.0] * features,
        )

    def _wished_types(self, wish: TableSharding) -> list[str]:
        for kind in wish.sharding_types:
            check_sharding_type(kind, self._key("sharding_types"))
            if (objection := self._objection(kind, wish)) is not None:
                what, hint = objection
                raise UserError(f"{self._key('sharding_types')} has {kind!r}: {what}", hint)
        return list(wish.sharding_types)

    def _objection(self, kind: str, wish: TableSharding) -> tuple[str, str] | None:
        """Why this table cannot become `kind`, and what to do instead; None where it can."""
        offered = self.sharder.sharding_types(self.device)
        if kind not in offered:
            what = f"TorchRec does not have it for {self.sharder.module_type.__name__} on {self.device}"
            return what, f"take one of: {', '.join(offered)}"
        if kind in _ROW_TYPES and (objection := self._objection_to_rows(kind)) is not None:
            return objection
        if kind in _COLUMN_TYPES:
            return self._objection_to_columns(wish)
        if kind == "data_parallel" and not self.optimizer.has_dense_twin:
            what = f"fused {self.optimizer.name} changes only the rows that are looked up, a dense one all of them"
            return what, "take another sharding type, or train.optimizers.sparse.name adagrad, rowwise_adagrad or sgd"
        return None

    def _objection_to_rows(self, kind: str) -> tuple[str, str] | None:
        """fbgemm fails on a part without rows, and TorchRec rounds the rows of a part up."""
        rows = self.config.num_embeddings
        parts = self.world_size if kind == "row_wise" else self.local_world_size
        part = ceil(rows / parts)
        if part * (parts - 1) < rows:
            return None
        what = f"its {rows} rows in parts of {part} leave one of {parts} workers without any"
        return what, "take table_wise or data_parallel for so small a table"

    def _objection_to_columns(self, wish: TableSharding) -> tuple[str, str] | None:
        width, step = self.config.embedding_dim, wish.min_partition or _COLUMN_STEP
        if self.optimizer.works_by_row:
            what = f"{self.optimizer.name} updates whole rows, parts of a row would each go their own way"
            return what, "take row_wise or table_wise, or train.optimizers.sparse.name=adagrad"
        if step % _COLUMN_STEP or width % step:
            what = f"its width {width} cannot be cut into parts of {step} columns"
            divisors = [n for n in range(_COLUMN_STEP, width + 1, _COLUMN_STEP) if width % n == 0]
            if divisors:
                return what, f"set {self._key('min_partition')} to one of: {', '.join(map(str, divisors))}"
            return what, f"take row_wise or table_wise, or a width that is a multiple of {_COLUMN_STEP}"
        return None

    def _part_columns(self, wish: TableSharding) -> int:
        """The columns of a column-wise part; the whole width where it cannot be cut."""
        width = self.config.embedding_dim
        if wish.min_partition is not None:
            return wish.min_partition
        fitting = (n for n in range(_COLUMN_STEP, width, _COLUMN_STEP) if width % n == 0)
        return next((n for n in fitting if n >= ceil(width / self.world_size)), width)

    def _kernels(self, wish: TableSharding, types: list[str]) -> list[str] | None:
        offered = sorted({kernel for kind in types for kernel in self.sharder.compute_kernels(kind, self.device)})
        for kernel in wish.compute_kernels:
            known = [kernel.value for kernel in EmbeddingComputeKernel]
            if kernel not in known:
                raise UserError(f"{self._key('compute_kernels')} has {kernel!r}", nearest(kernel, known))
            if kernel not in offered:
                raise UserError(
                    f"{self._key('compute_kernels')} has {kernel!r}, which TorchRec does not have on {self.device}",
                    f"take one of: {', '.join(offered)}",
                )
        return list(wish.compute_kernels) or None

    def _key(self, name: str) -> str:
        return f"{KEY}.tables.{self.config.name}.{name}"


def check_sharding_type(kind: str, key: str) -> None:
    """Raise UserError for a word that is no sharding type of TorchRec."""
    known = [kind.value for kind in ShardingType]
    if kind not in known:
        raise UserError(f"{key} has {kind!r}, which is no sharding type", nearest(kind, known))


def check_table_names(wishes: Mapping[str, TableSharding], tables: Iterable[str]) -> None:
    """Raise UserError for a wish about a table that does not exist."""
    known = set(tables)
    for name in wishes:
        if name not in known:
            raise UserError(f"{KEY}.tables names {name!r}, which the model does not have", nearest(name, known))
