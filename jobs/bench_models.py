"""The bare loop, and the same loop over the classes that TorchRec publishes. Nothing of raysys is imported here."""

from __future__ import annotations

from collections.abc import Iterator

import bench_bare
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchrec import KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRM, DLRM_DCN
from typing_extensions import TypedDict, Unpack


class LoopOptions(TypedDict):
    """Turns of `steps` steps on this process's batches of `batch_size` rows of the log; pipeline: base or sparse_dist."""

    log: str
    batch_size: int
    steps: int
    pipeline: str


class Published(nn.Module):
    """`torchrec.models.dlrm` in the sizes of the bare loop: dlrm or dcn."""

    def __init__(self, name: str, device: str = "meta") -> None:
        super().__init__()
        tables, bottom, top = bench_bare.Model("dlrm", device).tables, [256, 128, 16], [256, 128, 64, 1]
        dense = len(bench_bare.DENSE)
        self.model = (
            DLRM(tables, dense, bottom, top)
            if name == "dlrm"
            else DLRM_DCN(tables, dense, bottom, top, dcn_num_layers=3, dcn_low_rank_dim=64)
        )

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss and the logits [B]."""
        logits = self.model(batch.dense_features, batch.sparse_features)[:, 0]
        return nn.functional.binary_cross_entropy_with_logits(logits, batch.labels), logits.detach()


def dense_parameters(model: nn.Module) -> int:
    """Parameters outside of the tables."""
    return sum(p.numel() for name, p in model.named_parameters() if "embedding_bags" not in name)


def flops_per_row(model: nn.Module) -> int:
    """Floating-point operations of one row's forward pass in matrix products; a model on the CPU."""
    ids = torch.zeros(2 * len(bench_bare.FIELDS), dtype=torch.int64)
    sparse = KeyedJaggedTensor(bench_bare.FIELDS, ids, lengths=torch.ones_like(ids))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(Batch(torch.zeros(2, len(bench_bare.DENSE)), sparse, torch.zeros(2)))
    return counter.get_total_flops() // 2


def bare(model: str, **options: Unpack[LoopOptions]) -> Iterator[float]:
    """The rates of the bare loop."""
    return _run(bench_bare.Model(model), options)


def published(model: str, **options: Unpack[LoopOptions]) -> Iterator[float]:
    """The rates of the loop over TorchRec's classes."""
    return _run(Published(model), options)


def _run(model: nn.Module, options: LoopOptions) -> Iterator[float]:
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    batches = bench_bare.read_batches(options["log"], options["batch_size"], rank, world_size)
    return bench_bare.run(model, batches, torch.device("cpu"), options["steps"], options["pipeline"])
