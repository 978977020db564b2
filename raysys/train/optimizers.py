"""All optimisers of a run behind `zero_grad` and `step`: tables, dense parameters, learning rates, clipping, states."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torch.distributed._shard.sharding_spec import ShardMetadata
from torch.distributed.tensor import DTensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from raysys.errors import UserError, nearest
from raysys.train.apollo import Apollo, LowRank
from raysys.train.dense_parallel import DenseParallel
from raysys.train.schedules import Schedule
from raysys.train.sparse_optimizers import SparseOptimizer
from raysys.train.tables import TableRef, TableValue, find_tables, table_weights


@dataclass(frozen=True)
class DenseOptimizer:
    """The optimiser of everything that is not an embedding table. betas: all but adagrad and sgd; eps: all but sgd.

    weight_decay: decoupled for adamw, apollo and apollo_mini, an L2 term for the others. low_rank: of apollo and apollo_mini.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    name: Literal["adamw", "adam", "adagrad", "sgd", "apollo", "apollo_mini"] = "adam"
    lr: NonNegativeFloat = 1e-3
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[NonNegativeFloat, NonNegativeFloat] = (0.9, 0.999)
    low_rank: LowRank = field(default_factory=LowRank)
    schedule: Schedule = field(default_factory=Schedule)

    def check(self, dense_parallel: DenseParallel) -> None:
        """Raise UserError for what does not go together, before a worker starts."""
        if not self.name.startswith("apollo"):
            return
        if dense_parallel != "ddp":
            raise UserError(
                f"train.optimizers.dense.name is {self.name!r}, which needs whole matrices, and "
                f"train.sharding.dense_parallel is {dense_parallel!r}",
                "train.sharding.dense_parallel=ddp, or adamw",
            )
        if self.name == "apollo_mini" and self.low_rank.rank not in (None, 1):
            raise UserError(
                f"train.optimizers.dense.low_rank.rank is {self.low_rank.rank}, and apollo_mini has rank 1",
                "leave it null, or take apollo",
            )

    def build(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser, with its whole state made: what is made in the first step only cannot be loaded into."""
        if self.name == "sgd":
            return torch.optim.SGD(parameters, lr=self.lr, weight_decay=self.weight_decay)
        if self.name == "adagrad":
            return torch.optim.Adagrad(parameters, lr=self.lr, eps=self.eps, weight_decay=self.weight_decay)
        if self.name in ("apollo", "apollo_mini"):
            mini = self.name == "apollo_mini"
            return Apollo(parameters, self.lr, self.betas, self.eps, self.weight_decay, self.low_rank, mini)
        kind = torch.optim.AdamW if self.name == "adamw" else torch.optim.Adam
        optimizer = kind(
            parameters, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, fused=True
        )
        _make_state(optimizer)
        return optimizer


@dataclass(frozen=True)
class OptimizerSettings:
    """`clip` maps a prefix of parameter names (`model`, `model.towers`, `objective`) to the largest norm of its gradient.

    A parameter belongs to the longest prefix that fits. Embedding tables are never clipped: a fused update has
    happened before a norm is known, and data-parallel tables train as fused ones do.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    sparse: SparseOptimizer = field(default_factory=SparseOptimizer)
    dense: DenseOptimizer = field(default_factory=DenseOptimizer)
    clip: dict[str, PositiveFloat] = field(default_factory=dict)


class Optimizers:
    """The optimisers of a sharded model. Fused updates happen in the backward pass, with the rate set one step before.

    Steps count from 0. After a checkpoint was loaded, `set_step` says with which step training goes on.
    """

    def __init__(self, model: DistributedModelParallel, settings: OptimizerSettings, total_steps: int) -> None:
        self._settings, self._total_steps = settings, total_steps
        self._model, self._fused = model, model.fused_optimizer
        self._replicated = {table.key: table for table in find_tables(model) if _is_replicated(table, model)}
        self._dense_parameters = dense_parameters(model)
        twins = [table.parameter for table in self._replicated.values()]
        self._twin = settings.sparse.dense_twin(twins) if twins else None
        dense = [parameter for parameter in self._dense_parameters.values() if parameter.requires_grad]
        self._dense = settings.dense.build(dense) if dense else None
        self._clip_groups = clip_groups(self._dense_parameters, settings.clip)
        self._rates: dict[str, float] = {}
        self._set_rates(0)

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for optimizer in (self._dense, self._twin):
            if optimizer is not None:
                optimizer.zero_grad(set_to_none=True)

    def step(self, step: int) -> None:
        """Finish step `step`: clip and update what the backward pass has not, and set the rates of the next one."""
        for prefix, parameters in self._clip_groups.items():
            clip_gradients(parameters, self._settings.clip[prefix])
        for optimizer in (self._dense, self._twin):
            if optimizer is not None:
                optimizer.step()
        self._set_rates(step + 1)

    def set_step(self, step: int) -> None:
        """Go on with `step` as the next one: its learning rates, and the bias correction of fused Adam and LAMB."""
        self._fused.set_optimizer_step(step)
        self._rates = {}  # whatever was loaded, all are handed over again
        self._set_rates(step)

    def learning_rates(self) -> dict[str, float]:
        """The rates of the next step, `sparse` and `dense`."""
        return dict(self._rates)

    def dense_states(self) -> dict[str, dict[str, Tensor]]:
        """The live state of the dense optimiser by parameter name; load into it in place."""
        if self._dense is None:
            return {}
        state = self._dense.state
        return {name: dict(state[parameter]) for name, parameter in self._dense_parameters.items() if state[parameter]}

    def table_states(self) -> dict[str, dict[str, TableValue]]:
        """The live state of the tables' optimiser by table and state name; load into it in place.

        Names and shapes are the same for fused optimisers and their dense twins, under every plan and on every rank:
        `sum` is [rows, columns] for Adagrad and [rows] for row-wise Adagrad; SGD has none. TorchRec's own names differ
        between sharded and data-parallel tables (meta-pytorch/torchrec issue 2394).
        """
        names = self._settings.sparse.state_names
        fused = self._fused.state_dict()["state"]
        weights = table_weights(self._model)
        states: dict[str, dict[str, TableValue]] = {}
        for table in find_tables(self._model):
            if table.key in self._replicated:
                assert self._twin is not None
                states[table.key] = {name: self._twin.state[table.parameter][name] for name in names}
                continue
            local = list(fused.get(f"{table.path}.{table.parameter_name}", {}).values())
            states[table.key] = {
                name: local[i] if local else self._absent_state(weights[table.key], name)
                for i, name in enumerate(names)
            }
        return states

    def _absent_state(self, weight: TableValue, name: str) -> ShardedTensor:
        """The state of a table of which this rank holds nothing: TorchRec leaves it out, collectives need it."""
        assert isinstance(weight, ShardedTensor)
        axes = 1 if name in self._settings.sparse.rowwise_states else 2
        shards = [
            ShardMetadata(shard.shard_offsets[:axes], shard.shard_sizes[:axes], shard.placement)
            for shard in weight.metadata().shards_metadata
        ]
        properties = TensorProperties(dtype=torch.float32)
        metadata = ShardedTensorMetadata(shards, weight.metadata().size[:axes], properties)
        return ShardedTensor._init_from_local_shards_and_global_metadata([], metadata)

    def _set_rates(self, step: int) -> None:
        rates = {
            name: settings.lr * settings.schedule.factor(step, self._total_steps)
            for name, settings in (("sparse", self._settings.sparse), ("dense", self._settings.dense))
        }
        if rates == self._rates:
            return  # handing a rate to fbgemm takes as long as a small kernel
        self._rates = rates
        for optimizer, name in ((self._dense, "dense"), (self._twin, "sparse"), (self._fused, "sparse")):
            for group in optimizer.param_groups if optimizer is not None else ():
                group["lr"] = self._rates[name]
        self._fused.step()  # updates nothing: it hands the rate to fbgemm


def build_optimizers(model: DistributedModelParallel, settings: OptimizerSettings, total_steps: int) -> Optimizers:
    """The optimisers of a model that `shard` made; total_steps: the length of the run, where decay ends."""
    return Optimizers(model, settings, total_steps)


def dense_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a plain or sharded TrainStep by name, without those of its embedding tables."""
    tables = tuple(f"{table.path}." for table in find_tables(module))
    return {name: parameter for name, parameter in module.named_parameters() if not name.startswith(tables)}


def clip_groups(parameters: Mapping[str, nn.Parameter], clip: Mapping[str, float]) -> dict[str, list[nn.Parameter]]:
    """The parameters of each group of `clip`; a prefix that fits no parameter is a UserError."""
    groups: dict[str, list[nn.Parameter]] = {prefix: [] for prefix in clip}
    for name, parameter in parameters.items():
        fitting = [prefix for prefix in clip if name == prefix or name.startswith(f"{prefix}.")]
        if fitting:
            groups[max(fitting, key=len)].append(parameter)
    for prefix, members in groups.items():
        if not members:
            known = {".".join(name.split(".")[: prefix.count(".") + 1]) for name in parameters}
            raise UserError(
                f"train.optimizers.clip names {prefix!r}, which no dense parameter has", nearest(prefix, known)
            )
    return groups


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """Scale the gradients of one group so that their common 2-norm is at most `max_norm`, across the ranks for FSDP."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    kinds: list[list[Tensor]] = [[], []]  # plain and sharded ones have no common operations
    for gradient in gradients:
        kinds[isinstance(gradient, DTensor)].append(gradient)
    norms = [torch.nn.utils.get_total_norm(kind) for kind in kinds if kind]
    if not norms:
        return
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    scale = (max_norm / (torch.stack(whole).norm() + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        (gradient.to_local() if isinstance(gradient, DTensor) else gradient).mul_(scale)


def _is_replicated(table: TableRef, model: DistributedModelParallel) -> bool:
    return model.plan.plan[table.path][table.name].sharding_type == "data_parallel"


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the state that Adam makes in its first step, as zeros, without moving a parameter."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()
