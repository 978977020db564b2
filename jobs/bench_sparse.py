"""One large table under Zipf ids: fbgemm's fused Adagrad through TorchRec, and torch's own sparse Adagrad."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder

LR, EPS, EXPONENT = 0.02, 1e-8, 1.1
BATCHES = 8


@dataclass(frozen=True)
class Trainer:
    """`step(ids [B, L], gradient [B, width])` looks bags up, goes back and updates; `weight()` is the table."""

    step: Callable[[Tensor, Tensor], None]
    weight: Callable[[], Tensor]


def fused(optimizer: str, steps: int, **sizes: int) -> Iterator[float]:
    """The rates of fbgemm's `optimizer`, EXACT_ADAGRAD or EXACT_ROWWISE_ADAGRAD; sizes: see `_turns`."""
    return _turns(fused_trainer(sizes["rows"], sizes["width"], EmbOptimType[optimizer]), steps, **sizes)


def plain(steps: int, **sizes: int) -> Iterator[float]:
    """The rates of `nn.EmbeddingBag(sparse=True)` with `torch.optim.Adagrad`; sizes: see `_turns`."""
    return _turns(plain_trainer(sizes["rows"], sizes["width"]), steps, **sizes)


def fused_trainer(rows: int, width: int, optimizer: EmbOptimType) -> Trainer:
    """A table with an optimiser that is fused into its backward pass; needs a process group."""
    config = EmbeddingBagConfig(rows, width, name="table", feature_names=["ids"], init_fn=_initialize)
    arguments = {"optimizer": optimizer, "learning_rate": LR, "eps": EPS}
    model = DistributedModelParallel(
        EmbeddingBagCollection([config], device=torch.device("meta")),
        device=torch.device("cpu"),
        sharders=[_TableWise(arguments)],
    )

    def step(ids: Tensor, gradient: Tensor) -> None:
        lengths = torch.full((len(ids),), ids.shape[1], dtype=torch.int32)
        model(KeyedJaggedTensor(["ids"], ids.reshape(-1), lengths=lengths)).values().backward(gradient)

    return Trainer(step, lambda: model.state_dict()["embedding_bags.table.weight"].local_shards()[0].tensor)


def plain_trainer(rows: int, width: int) -> Trainer:
    """The same table in torch alone: a sparse gradient, and an optimiser that takes it."""
    table = nn.EmbeddingBag(rows, width, mode="sum", sparse=True)
    _initialize(table.weight)
    optimizer = torch.optim.Adagrad(table.parameters(), lr=LR, eps=EPS)

    def step(ids: Tensor, gradient: Tensor) -> None:
        optimizer.zero_grad()
        table(ids).backward(gradient)
        optimizer.step()

    return Trainer(step, table.weight.detach)


def zipf_ids(rows: int, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Ids below `rows` from a truncated power law, the frequent ones spread over the table."""
    power = 1 - EXPONENT
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    rank = ((rows**power - 1) * uniform + 1).pow(1 / power).long().clamp(1, rows) - 1
    return rank * 0x9E3779B1 % rows  # a prime: every rank has an id of its own


class _TableWise(EmbeddingBagCollectionSharder):
    """One process might as well replicate its table, and a replicated table has no fused optimiser."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return ["table_wise"]


@torch.no_grad()
def _initialize(weight: Tensor) -> None:
    weight.copy_(torch.linspace(-0.05, 0.05, weight.numel()).view_as(weight))


def _turns(trainer: Trainer, steps: int, rows: int, width: int, batch_size: int, length: int) -> Iterator[float]:
    """Bags per second in turns of `steps` steps: a table of `rows` rows, bags of `length` ids that are in memory."""
    generator = torch.Generator().manual_seed(0)
    batches = [zipf_ids(rows, (batch_size, length), generator) for _ in range(BATCHES)]
    gradient = torch.randn(batch_size, width, generator=generator)
    while True:
        started = time.perf_counter()
        for number in range(steps):
            trainer.step(batches[number % BATCHES], gradient)
        yield steps * batch_size / (time.perf_counter() - started)
