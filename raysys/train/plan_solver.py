"""TorchRec's planner with memory budgets, and what is missing where it finds no plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

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
from torchrec.distributed.types import ModuleSharder, ShardingPlan

from raysys.errors import UserError
from raysys.train.plan_checks import KEY
from raysys.train.sharders import table_sharders
from raysys.train.sparse_optimizers import SparseOptimizer
from raysys.train.tables import find_tables

_LARGEST_BUDGET = 1 << 50


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker, and the share that tables must not take."""

    hbm_bytes: int
    ddr_bytes: int
    reserve: float


@dataclass(frozen=True)
class PlanningProblem:
    """A model (tables on the meta device), the workers, and what each table may become."""

    train_step: nn.Module
    world_size: int
    local_world_size: int
    device: str
    batch_size: int
    constraints: Mapping[str, ParameterConstraints]
    optimizer: SparseOptimizer

    def solve(self, memory: Memory) -> ShardingPlan:
        """The plan that fits and is fastest by TorchRec's cost model; raises UserError where none fits."""
        try:
            return self._plan(memory)
        except PlannerError as error:
            raise self._no_fit(memory, error) from error

    def solve_if_possible(self, memory: Memory) -> ShardingPlan | None:
        """The same, but None where no plan fits."""
        try:
            return self._plan(memory)
        except PlannerError:
            return None

    def _plan(self, memory: Memory) -> ShardingPlan:
        topology = self._topology(memory)
        planner = EmbeddingShardingPlanner(
            topology=topology,
            batch_size=self.batch_size,
            enumerator=self._enumerator(topology),
            storage_reservation=FixedPercentageStorageReservation(0.0),  # the topology has it taken off already
            constraints=dict(self.constraints),
            stats=[],
        )
        with self._declared_optimizer():
            return planner.plan(self.train_step, table_sharders(self.optimizer))

    def _enumerator(self, topology: Topology) -> EmbeddingEnumerator:
        return _OrderedEnumerator(topology=topology, batch_size=self.batch_size, constraints=dict(self.constraints))

    def _topology(self, memory: Memory) -> Topology:
        """The workers, with what is left for tables of their memory."""
        tables = {id(table.parameter) for table in find_tables(self.train_step)}
        dense = sum(p.numel() * p.element_size() for p in self.train_step.parameters() if id(p) not in tables)
        dense *= 4  # the parameters, their gradients, and two states of Adam
        hbm = int(memory.hbm_bytes * (1 - memory.reserve)) - (dense if self.device == "cuda" else 0)
        ddr = int(memory.ddr_bytes * (1 - memory.reserve)) - (dense if self.device == "cpu" else 0)
        return TopologyFactory.create_topology(
            TrainerConfig(
                world_size=self.world_size,
                local_world_size=self.local_world_size,
                hbm_cap_bytes=max(hbm, 0),
                ddr_cap_bytes=max(ddr, 0),
            ),
            kernel_config=KernelConfig(compute_device=self.device),
        )

    @contextmanager
    def _declared_optimizer(self) -> Iterator[None]:
        """Inside, the tables carry the mark from which TorchRec's planner learns the size of the optimiser's state."""
        parameters: list[Any] = [table.parameter for table in find_tables(self.train_step)]
        for parameter in parameters:
            parameter._optimizer_classes = [self.optimizer.torchrec_class]
        try:
            yield
        finally:
            for parameter in parameters:
                del parameter._optimizer_classes

    def _no_fit(self, memory: Memory, error: PlannerError) -> UserError:
        """Which table does not fit, how many bytes are missing, and a budget that was tried and is enough."""
        kind = "hbm" if self.device == "cuda" else "ddr"
        key = f"{KEY}.{kind}_bytes"
        topology = self._topology(memory)
        free = getattr(topology.devices[0].storage, kind)
        enough = self._enough(memory, kind)
        if enough is None:
            return UserError(f"TorchRec finds no plan: {' '.join(str(error).split())}", f"loosen {KEY}.tables")
        with self._declared_optimizer():
            options = self._enumerator(topology).enumerate(self.train_step, table_sharders(self.optimizer))
        needs = {
            option.name: min(_need(o, kind, self.world_size) for o in options if o.name == option.name)
            for option in options
        }
        largest = max(needs, key=lambda name: (needs[name], name))
        types = sorted({option.sharding_type for option in options if option.name == largest})
        left = f"a worker has {free:,} left for tables ({key} less {KEY}.reserve and the dense part)"
        if needs[largest] > free:
            missing = f"{needs[largest] - free:,} bytes are missing"
            message = f"table {largest!r} needs {needs[largest]:,} bytes of a worker as {' or '.join(types)}, {left}: {missing}"
        else:
            largest_need = f"the largest is {largest!r} with {needs[largest]:,} bytes of a worker"
            before = memory.ddr_bytes if kind == "ddr" else memory.hbm_bytes
            message = f"the tables do not fit together, {left}: {enough - before:,} bytes are missing; {largest_need}"
        wider = "" if "row_wise" in types else f", or allow row_wise in {KEY}.tables.{largest}.sharding_types"
        return UserError(message, f"set {key} to {enough:,}{wider}, or take more workers")

    def _enough(self, memory: Memory, kind: str) -> int | None:
        """A budget with which there is a plan, at most 1% above the least one; None where memory is not what is missing."""
        field = f"{kind}_bytes"

        def fits(budget: int) -> bool:
            return self.solve_if_possible(replace(memory, **{field: budget})) is not None

        low = max(getattr(memory, field), 1)
        high = 2 * low
        while not fits(high):
            low, high = high, 2 * high
            if high > _LARGEST_BUDGET:
                return None
        while high - low > max(low // 100, 1):
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        return high


class _OrderedEnumerator(EmbeddingEnumerator):
    """Lists the options in one order: TorchRec intersects sets of strings, whose order differs from process to process."""

    def enumerate(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> list[ShardingOption]:
        """All options, by module, table, sharding type and kernel."""
        options = super().enumerate(module, sharders)
        return sorted(options, key=lambda one: (one.path, one.name, one.sharding_type, one.compute_kernel))


def _need(option: ShardingOption, kind: str, world_size: int) -> int:
    """Bytes of the fullest worker, with nothing else on it."""
    largest = max(getattr(shard.storage, kind) for shard in option.shards)
    return largest * ceil(len(option.shards) / world_size)
