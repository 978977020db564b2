"""Which worker holds which part of which table: planned on the driver, without workers, and checked before one starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import ceil
from typing import Any

import psutil
import torch
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    KernelConfig,
    ParameterConstraints,
    PlannerError,
    ShardingOption,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ModuleSharder, ParameterSharding, ShardingPlan

from raysys.errors import UserError
from raysys.train.dense_parallel import DenseParallel
from raysys.train.optimizers import OptimizerSettings
from raysys.train.plan_checks import KEY, Candidate, TableSharding, check_sharding_type, check_table_names
from raysys.train.sharders import table_sharders
from raysys.train.sparse_optimizers import SparseOptimizer
from raysys.train.tables import TableRef, find_tables


@dataclass(frozen=True)
class ShardingSettings:
    """Memory budgets, and what tables may become, in TorchRec's words.

    hbm_bytes, ddr_bytes: GPU and host memory of one worker (None: what this machine has, divided by its workers).
    reserve: the share of both that is kept for activations, batches and the rest of the process.
    sharding_types: what the planner may choose from for a table without an entry in `tables`.
    dense_parallel: `ddp` replicates the dense part, `fsdp` shards it over all workers, `hsdp` over those of one host.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    hbm_bytes: int | None = None
    ddr_bytes: int | None = None
    reserve: float = 0.15
    sharding_types: tuple[str, ...] = ("table_wise", "row_wise", "column_wise", "data_parallel")
    tables: dict[str, TableSharding] = field(default_factory=dict)
    dense_parallel: DenseParallel = "ddp"


@dataclass(frozen=True)
class PlannedTable:
    """One table of a plan. bytes_per_rank: weights and optimiser state on each of `ranks`, in their order."""

    table: str
    rows: int
    width: int
    sharding: str
    kernel: str
    ranks: list[int]
    bytes_per_rank: list[int]


@dataclass
class TablePlan(ShardingPlan):
    """A plan of TorchRec with what is known of its tables. It is pickled to the workers, so that all follow the same."""

    tables: list[PlannedTable]
    world_size: int

    def bytes_per_rank(self) -> list[int]:
        """Weights and optimiser state of all tables, for each worker."""
        held = [0] * self.world_size
        for table in self.tables:
            for rank, size in zip(table.ranks, table.bytes_per_rank, strict=True):
                held[rank] += size
        return held


def plan_tables(
    train_step: nn.Module,
    world_size: int,
    device: str,
    batch_size: int,
    settings: ShardingSettings,
    optimizers: OptimizerSettings,
    local_world_size: int | None = None,
) -> TablePlan:
    """Place the tables of a model (on the meta device) on `world_size` workers; the same input gives the same plan.

    batch_size: rows of a step on one worker. local_world_size: the workers of one host (None: all of them).
    Raises UserError for impossible wishes and for tables that do not fit, naming the table and the key to change.
    """
    optimizers.sparse.check(device)
    local = local_world_size or world_size
    tables = find_tables(train_step)
    sharders = table_sharders(optimizers.sparse)
    constraints = _constraints(tables, sharders, device, (world_size, local), settings, optimizers.sparse)
    topology = _topology(train_step, world_size, local, device, settings)
    enumerator = _OrderedEnumerator(topology=topology, batch_size=batch_size, constraints=constraints)
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        enumerator=enumerator,
        storage_reservation=FixedPercentageStorageReservation(0.0),  # the topology has the reserve taken off already
        constraints=constraints,
        stats=[],
    )
    with _declared(optimizers.sparse, tables):
        try:
            plan = planner.plan(train_step, sharders)
        except PlannerError as error:
            raise _no_fit(enumerator.enumerate(train_step, sharders), topology, settings, str(error)) from error
    planned = [_planned(table, plan, world_size, optimizers.sparse) for table in tables]
    return TablePlan(plan.plan, planned, world_size)


def plan_table(plan: TablePlan) -> list[dict[str, Any]]:
    """The `tables` of the plan event."""
    return [asdict(table) for table in plan.tables]


def format_plan(plan: TablePlan) -> str:
    """The plan as text: a line per table, largest first, and the bytes on each worker."""
    header = ("table", "rows", "width", "sharding", "kernel", "workers", "MB per worker")
    lines = [header]
    for table in sorted(plan.tables, key=lambda table: (-sum(table.bytes_per_rank), table.table)):
        sizes = ", ".join(f"{size / 1e6:.2f}" for size in dict.fromkeys(table.bytes_per_rank))
        workers = ", ".join(map(str, table.ranks))
        row = (table.table, f"{table.rows:,}", str(table.width), table.sharding, table.kernel, workers, sizes)
        lines.append(row)
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    loads = ", ".join(f"worker {rank}: {size / 1e6:.2f} MB" for rank, size in enumerate(plan.bytes_per_rank()))
    return "\n".join([*text, f"tables and optimiser state: {loads}"])


class _OrderedEnumerator(EmbeddingEnumerator):
    """Lists the options in one order: TorchRec intersects sets of strings, whose order differs from process to process."""

    def enumerate(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> list[ShardingOption]:
        """All options, by module, table, sharding type and kernel."""
        options = super().enumerate(module, sharders)
        return sorted(options, key=lambda one: (one.path, one.name, one.sharding_type, one.compute_kernel))


def _constraints(
    tables: list[TableRef],
    sharders: list[ModuleSharder[nn.Module]],
    device: str,
    sizes: tuple[int, int],
    settings: ShardingSettings,
    optimizer: SparseOptimizer,
) -> dict[str, ParameterConstraints]:
    check_table_names(settings.tables, [table.name for table in tables])
    for kind in settings.sharding_types:
        check_sharding_type(kind, f"{KEY}.sharding_types")
    by_type = {sharder.module_type: sharder for sharder in sharders}
    constraints = {}
    for table in tables:
        candidate = Candidate(table.config, by_type[type(table.collection)], device, *sizes, optimizer)
        wish = settings.tables.get(table.name, TableSharding())
        constraints[table.name] = candidate.constraints(wish, settings.sharding_types)
    return constraints


def _topology(
    train_step: nn.Module, world_size: int, local_world_size: int, device: str, settings: ShardingSettings
) -> Topology:
    """The workers, with the memory that the budgets leave for tables."""
    tables = {id(table.parameter) for table in find_tables(train_step)}
    dense = sum(p.numel() * p.element_size() for p in train_step.parameters() if id(p) not in tables)
    dense *= 4  # the parameters, their gradients, and two states of Adam
    hbm, ddr = _budgets(device, local_world_size, settings)
    hbm_left = int(hbm * (1 - settings.reserve)) - (dense if device == "cuda" else 0)
    ddr_left = int(ddr * (1 - settings.reserve)) - (dense if device == "cpu" else 0)
    return TopologyFactory.create_topology(
        TrainerConfig(
            world_size=world_size,
            local_world_size=local_world_size,
            hbm_cap_bytes=max(hbm_left, 0),
            ddr_cap_bytes=max(ddr_left, 0),
        ),
        kernel_config=KernelConfig(compute_device=device),
    )


def _budgets(device: str, local_world_size: int, settings: ShardingSettings) -> tuple[int, int]:
    """Bytes of GPU and host memory of one worker."""
    ddr = settings.ddr_bytes or psutil.virtual_memory().total // local_world_size
    if device == "cpu":
        return 0, ddr
    if settings.hbm_bytes is None and not torch.cuda.is_available():
        raise UserError(
            f"{KEY}.hbm_bytes is not set and this machine has no GPU to ask", "set it to the bytes of a worker's GPU"
        )
    return settings.hbm_bytes or torch.cuda.get_device_properties(0).total_memory, ddr


@contextmanager
def _declared(optimizer: SparseOptimizer, tables: list[TableRef]) -> Iterator[None]:
    """Inside, the tables carry the mark from which TorchRec's planner learns the size of the optimiser's state."""
    parameters: list[Any] = [table.parameter for table in tables]
    for parameter in parameters:
        parameter._optimizer_classes = [optimizer.torchrec_class]
    try:
        yield
    finally:
        for parameter in parameters:
            del parameter._optimizer_classes


def _planned(table: TableRef, plan: ShardingPlan, world_size: int, optimizer: SparseOptimizer) -> PlannedTable:
    module_plan: Mapping[str, ParameterSharding] = plan.plan[table.path]
    sharding = module_plan[table.name]
    rows, columns = table.parameter.shape
    held: dict[int, int] = {}
    if sharding.sharding_spec is None:
        parts = [(rank, (rows, columns)) for rank in range(world_size)]
    else:
        parts = [(part.placement.rank(), part.shard_sizes) for part in sharding.sharding_spec.shards]
    for rank, (part_rows, part_columns) in parts:
        size = 4 * part_rows * part_columns + optimizer.state_bytes(part_rows, part_columns)
        held[rank] = held.get(rank, 0) + size
    ranks = sorted(held)
    kind, kernel = sharding.sharding_type, sharding.compute_kernel
    return PlannedTable(table.key, rows, columns, kind, kernel, ranks, [held[rank] for rank in ranks])


def _no_fit(options: list[ShardingOption], topology: Topology, settings: ShardingSettings, reason: str) -> UserError:
    """Which table does not fit, how many bytes are missing, and what to change."""
    memory = "hbm" if topology.compute_device == "cuda" else "ddr"
    key = f"{KEY}.{memory}_bytes"
    free = getattr(topology.devices[0].storage, memory)
    world_size = topology.world_size
    by_table: dict[str, list[ShardingOption]] = {}
    for option in options:
        by_table.setdefault(option.name, []).append(option)

    def needed(option: ShardingOption) -> int:
        """Bytes on the fullest worker."""
        largest = max(getattr(shard.storage, memory) for shard in option.shards)
        return largest * ceil(len(option.shards) / world_size)

    best = {name: min(needed(option) for option in found) for name, found in by_table.items()}
    largest = max(best, key=lambda name: (best[name], name))
    kinds = sorted({option.sharding_type for option in by_table[largest]})
    budget = f"{free:,} bytes of a worker are left for tables ({key}, less train.sharding.reserve and the dense part)"
    if best[largest] > free:
        missing = best[largest] - free
        wider = "" if "row_wise" in kinds else f"allow row_wise in {KEY}.tables.{largest}.sharding_types, "
        return UserError(
            f"table {largest!r} needs {best[largest]:,} bytes of a worker as {' or '.join(kinds)}, {budget}: "
            f"{missing:,} bytes are missing",
            f"{wider}raise {key} by {ceil(missing / (1 - settings.reserve)):,}, or take more workers",
        )
    total = sum(
        min(sum(getattr(s.storage, memory) for s in option.shards) for option in found) for found in by_table.values()
    )
    missing = total - free * world_size
    if missing > 0:
        return UserError(
            f"the tables need {total:,} bytes, {world_size} workers have {free * world_size:,}: {missing:,} bytes are "
            f"missing; the largest table is {largest!r}; {budget}",
            f"raise {key} by {ceil(missing / world_size / (1 - settings.reserve)):,}, or take more workers",
        )
    return UserError(
        f"no plan fits, the largest table is {largest!r} ({best[largest]:,} bytes of a worker as {' or '.join(kinds)}); "
        f"{budget}; TorchRec says: {' '.join(reason.split())[:200]}",
        f"allow row_wise in {KEY}.tables.{largest}.sharding_types, or raise {key}",
    )
