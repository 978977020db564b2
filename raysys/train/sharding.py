"""Turn a plain model into a sharded one on the workers: tables as a plan says, the dense part replicated or sharded."""

from __future__ import annotations

import warnings
from typing import cast

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel, get_unwrapped_module
from torchrec.distributed.types import ShardingPlan

from raysys.models.embeddings import Tables, fill_initial_weights
from raysys.train.dense_parallel import DenseParallel, dense_wrapper
from raysys.train.optimizers import OptimizerSettings
from raysys.train.sharders import table_sharders
from raysys.train.step import TrainStep
from raysys.train.tables import TableRef, find_tables, local_parts, table_weights


def shard(
    train_step: TrainStep,
    plan: ShardingPlan,
    device: torch.device,
    optimizers: OptimizerSettings,
    *,
    seed: int = 0,
    dense_parallel: DenseParallel = "ddp",
) -> DistributedModelParallel:
    """Shard a model with tables on the meta device by `plan` (collective; a process group of one rank will do).

    Every table gets the same initial weights under every plan: those of its `Tables`, or, in a collection of the
    user's own, uniform ones within TorchRec's bounds from `seed`. The dense part starts from rank 0's. Torch's random
    generators go on as if nothing had been drawn.
    """
    plain = {table.key: table for table in find_tables(train_step)}
    initial = {key: initial_weights(train_step, table, seed) for key, table in plain.items()}
    columns = {key: table.parameter.shape[1] for key, table in plain.items()}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning, "torchrec")
        model = DistributedModelParallel(
            train_step,
            device=device,
            plan=plan,
            sharders=table_sharders(optimizers.sparse),
            data_parallel_wrapper=dense_wrapper(dense_parallel),
        )
    with torch.no_grad():
        for key, weight in table_weights(model).items():
            name, table_seed, bound = initial[key]
            for part in local_parts(weight):
                place = (part.row_offset, part.column_offset, columns[key])
                fill_initial_weights(part.values, name, table_seed, *place, bound)
    return model


def unwrap(model: DistributedModelParallel) -> TrainStep:
    """The `TrainStep` with its sharded tables, without the wrappers that synchronise gradients."""
    return cast(TrainStep, get_unwrapped_module(model))


def initial_weights(train_step: TrainStep, table: TableRef, seed: int) -> tuple[str, int, float]:
    """Name, seed and bound that decide the initial weights of a table."""
    owner = train_step.get_submodule(table.path.rpartition(".")[0])
    if isinstance(owner, Tables):
        return owner.initial(table.name)
    return table.name, seed, table.config.get_weight_init_max()
