"""The dense part of a sharded model on the workers: replicated (DDP), or sharded over all (FSDP) or one host (HSDP).

DHEN's recipe: where the dense part outgrows one GPU, parameters are sharded over the GPUs of a host, so that gathering
them stays on NVLink, and only each shard's gradient is summed over the hosts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.model_parallel import (
    DataParallelWrapper,
    DefaultDataParallelWrapper,
    DistributedModelParallel,
)
from torchrec.distributed.types import ShardedModule, ShardingEnv

from raysys.errors import UserError
from raysys.nn.collectives import world_size

DenseParallel = Literal["ddp", "fsdp", "hsdp"]


def dense_wrapper(kind: DenseParallel) -> DataParallelWrapper:
    """What DistributedModelParallel calls after the tables are sharded.

    DDP takes its buckets as gradients (no copy) and the graph as static: every step uses the same parameters, and those
    that no step uses are found in the first one. A single worker has nobody to average with, and no DDP.
    """
    if kind != "ddp":
        return FullyShardedWrapper(kind == "hsdp")
    return DefaultDataParallelWrapper(static_graph=True) if world_size() > 1 else Unwrapped()


class Unwrapped(DataParallelWrapper):
    """Leaves the dense part as it is."""

    def wrap(self, dmp: DistributedModelParallel, env: ShardingEnv, device: torch.device) -> None:
        """Move it to its device."""
        dmp.module.to(device)


class FullyShardedWrapper(DefaultDataParallelWrapper):
    """FSDP2 for each dense module that is called as a whole; DDP for parameters that no such module holds."""

    def __init__(self, within_host: bool) -> None:
        super().__init__(static_graph=True)
        self._within_host = within_host

    def wrap(self, dmp: DistributedModelParallel, env: ShardingEnv, device: torch.device) -> None:
        """Shard the dense modules of `dmp` in place."""
        mesh = self._mesh(device, env.world_size)
        for module in _dense_modules(dmp.module.to(device)):
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor.detach(), 0, group=env.process_group)  # as DDP does: all start from rank 0
            fully_shard(module, mesh=mesh)
        self._additional_params_to_ignore |= {
            name for name, parameter in dmp.named_parameters() if isinstance(parameter, DTensor)
        }
        super().wrap(dmp, env, device)

    def _mesh(self, device: torch.device, world_size: int) -> DeviceMesh:
        if not self._within_host:
            return init_device_mesh(device.type, (world_size,))
        local = get_local_size(world_size)
        if world_size % local:
            raise UserError(
                f"train.sharding.dense_parallel=hsdp needs as many workers on each host: {world_size} workers, {local} here",
                "change trainer.workers, or take fsdp or ddp",
            )
        return init_device_mesh(device.type, (world_size // local, local), mesh_dim_names=("hosts", "workers"))


def _dense_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The topmost modules below `module` that have parameters, no table, and a `forward` that FSDP can hook.

    The `forward` of a model, such as a member of an ensemble, is not called: its steps are.
    """
    for child in module.children():
        if isinstance(child, ShardedModule):
            continue
        in_parts = isinstance(child, nn.ModuleList | nn.ModuleDict) or hasattr(child, "interact")
        if in_parts or any(isinstance(part, ShardedModule) for part in child.modules()):
            yield from _dense_modules(child)
        elif any(True for _ in child.parameters()):
            yield child
