"""TorchRec's sharders, with what they lack on a CPU."""

from __future__ import annotations

import warnings
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec.distributed.batched_embedding_kernel import BatchedDenseEmbedding
from torchrec.distributed.embedding import EmbeddingCollectionSharder, ShardedEmbeddingCollection
from torchrec.distributed.embedding_lookup import GroupedEmbeddingsLookup
from torchrec.distributed.embedding_sharding import EmbeddingSharding, EmbeddingShardingInfo
from torchrec.distributed.embedding_types import GroupedEmbeddingConfig, ShardingType
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding.dp_sequence_sharding import DpSequenceEmbeddingSharding
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ModuleSharder, ShardingEnv
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from raysys.train.sparse_optimizers import SparseOptimizer

# fbgemm's dense lookup carries its own backward pass, which torch does not see; the parity tests show that it is right.
warnings.filterwarnings("ignore", message="fbgemm::dense_embedding_codegen_lookup_function", category=UserWarning)

_ROW_WISE_TYPES = [ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value, ShardingType.GRID_SHARD.value]


def table_sharders(optimizer: SparseOptimizer) -> list[ModuleSharder[nn.Module]]:
    """What shards the collections of a model, with the optimiser that is fused into their backward pass."""
    return [BagSharder(optimizer.fused_params()), IdSharder(optimizer.fused_params())]


class BagSharder(EmbeddingBagCollectionSharder):
    """Offers the row-wise types on a CPU too.

    TorchRec leaves them out there because gloo had no reduce-scatter (meta-pytorch/torchrec issue 1252). It has one now,
    and a table that no single host can hold needs them. The sharder of `EmbeddingCollection` makes no such exception.
    """

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """TorchRec's names of the types that a table of bags can have."""
        return list(dict.fromkeys([*super().sharding_types(compute_device_type), *_ROW_WISE_TYPES]))


class IdSharder(EmbeddingCollectionSharder):
    """Gives data-parallel tables a lookup that works on a CPU.

    fbgemm's dense lookup pools there what should stay one row per id (pytorch/FBGEMM issue 4586). The classes below lead
    from the sharder to that lookup; they change nothing else.
    """

    def shard(
        self,
        module: EmbeddingCollection,
        params: EmbeddingModuleShardingPlan,
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedEmbeddingCollection:
        """Shard one collection."""
        if device is None or device.type != "cpu":
            return super().shard(module, params, env, device, module_fqn)
        return _CpuCollection(module, params, env, self.fused_params, device, module_fqn=module_fqn)


class _CpuCollection(ShardedEmbeddingCollection):
    @classmethod
    def create_embedding_sharding(
        cls,
        sharding_type: str,
        sharding_infos: list[EmbeddingShardingInfo],
        env: ShardingEnv,
        *args: Any,
        **kwargs: Any,
    ) -> EmbeddingSharding:
        if sharding_type == ShardingType.DATA_PARALLEL.value:
            return _CpuReplicas(sharding_infos, env, torch.device("cpu"))
        return super().create_embedding_sharding(sharding_type, sharding_infos, env, *args, **kwargs)


class _CpuReplicas(DpSequenceEmbeddingSharding):
    def create_lookup(self, *args: Any, **kwargs: Any) -> GroupedEmbeddingsLookup:
        return _CpuLookup(self._grouped_embedding_configs, self._env.process_group, torch.device("cpu"))


class _CpuLookup(GroupedEmbeddingsLookup):
    def _create_embedding_kernel(
        self, config: GroupedEmbeddingConfig, pg: dist.ProcessGroup | None, device: torch.device | None, *args: Any
    ) -> BatchedDenseEmbedding:
        return _RowPerId(config, pg, device)


class _RowPerId(BatchedDenseEmbedding):
    """The rows of all tables stand one after another in one parameter; each id becomes its place there."""

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        first = [0, *accumulate(self._local_rows)]
        rows, start = torch.tensor([(self._local_rows[t], first[t]) for t in self._feature_table_map]).unbind(1)
        counts = torch.tensor(features.length_per_key())  # [F]
        ids = features.values().long()  # [N]
        if bool(((ids < 0) | (ids >= rows.repeat_interleave(counts))).any()):
            raise IndexError(f"an id of {', '.join(features.keys())} is outside of its table")
        places = ids + start.repeat_interleave(counts)
        return F.embedding(places, self.emb_module.weights.view(-1, self._local_cols[0]))  # [N, D]
