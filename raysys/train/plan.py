"""Which worker holds which part of which table: planned on the driver, without workers, and checked before one starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import psutil
import torch
from pydantic import Field, PositiveInt
from torch import nn
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import ShardingPlan

from raysys.errors import UserError
from raysys.train.dense_parallel import DenseParallel
from raysys.train.optimizers import OptimizerSettings
from raysys.train.plan_checks import KEY, Candidate, TableSharding, check_sharding_type, check_table_names
from raysys.train.plan_solver import Memory, PlanningProblem
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

    hbm_bytes: PositiveInt | None = None
    ddr_bytes: PositiveInt | None = None
    reserve: Annotated[float, Field(ge=0, lt=1)] = 0.15
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
    On a CPU, and with one worker, tables stay whole while they fit: with gloo, parts of tables cost more than TorchRec's
    cost model expects (row-wise took 1.2 to 2 times as long as table-wise on two workers). With one worker all are
    table-wise: data-parallel ones would save no exchange, and cost a second look-up and a dense update of the whole table.
    Raises UserError for impossible wishes and for tables that do not fit, naming the table and the key to change.
    """
    optimizers.sparse.check(device)
    optimizers.dense.check(settings.dense_parallel)
    local = local_world_size or world_size
    tables = find_tables(train_step)
    memory = _memory(device, local, settings)

    def problem(types: tuple[str, ...]) -> PlanningProblem:
        constraints = _constraints(tables, device, (world_size, local), settings.tables, types, optimizers.sparse)
        return PlanningProblem(train_step, world_size, local, device, batch_size, constraints, optimizers.sparse)

    for kind in settings.sharding_types:
        check_sharding_type(kind, f"{KEY}.sharding_types")
    plan = None
    if "table_wise" in settings.sharding_types and (device == "cpu" or world_size == 1):
        whole = ("table_wise", "data_parallel") if world_size > 1 else ("table_wise",)
        plan = problem(tuple(kind for kind in settings.sharding_types if kind in whole)).solve_if_possible(memory)
    if plan is None:
        plan = problem(settings.sharding_types).solve(memory)
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


def _constraints(
    tables: list[TableRef],
    device: str,
    sizes: tuple[int, int],
    wishes: dict[str, TableSharding],
    types: tuple[str, ...],
    optimizer: SparseOptimizer,
) -> dict[str, ParameterConstraints]:
    """What TorchRec's planner may do with each table: what is wished, or else one of `types`."""
    check_table_names(wishes, [table.name for table in tables])
    sharders = {sharder.module_type: sharder for sharder in table_sharders(optimizer)}
    constraints = {}
    for table in tables:
        candidate = Candidate(table.config, sharders[type(table.collection)], device, *sizes, optimizer)
        constraints[table.name] = candidate.constraints(wishes.get(table.name, TableSharding()), types)
    return constraints


def _memory(device: str, local_world_size: int, settings: ShardingSettings) -> Memory:
    """The budgets of the settings, or else what this machine has."""
    ddr = psutil.virtual_memory().total // local_world_size if settings.ddr_bytes is None else settings.ddr_bytes
    if device == "cpu":
        return Memory(0, ddr, settings.reserve)
    if settings.hbm_bytes is None and not torch.cuda.is_available():
        raise UserError(
            f"{KEY}.hbm_bytes is not set and this machine has no GPU to ask", "set it to the bytes of a worker's GPU"
        )
    hbm = torch.cuda.get_device_properties(0).total_memory if settings.hbm_bytes is None else settings.hbm_bytes
    return Memory(hbm, ddr, settings.reserve)


def _planned(table: TableRef, plan: ShardingPlan, world_size: int, optimizer: SparseOptimizer) -> PlannedTable:
    sharding = plan.plan[table.path][table.name]
    rows, columns = table.parameter.shape
    held: dict[int, int] = {}
    parts: Iterable[tuple[int, Sequence[int]]]
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
