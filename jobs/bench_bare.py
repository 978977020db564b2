"""The yardstick: DLRM, DCN v2 and DHEN in plain TorchRec, on batches that are in memory before the clock starts.

usage: torchrun --nproc-per-node 2 jobs/bench_bare.py dlrm|dcn|dhen LOG base|sparse_dist
LOG is a Parquet file or folder with label, i0..i12 and c0..c25; printed are the rows per second of each process.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator, Sequence

import pyarrow.parquet as pq
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.distributed import DistributedModelParallel, TrainPipelineBase, TrainPipelineSparseDist
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.modules.crossnet import LowRankCrossNet

ROWS = [1460, 583, 100000, 50000, 305, 24, 12517, 633, 3, 93145, 5683, 100000, 3194]
ROWS += [27, 14992, 100000, 10, 5652, 2173, 4, 100000, 18, 15, 80000, 105, 40000]
DENSE, FIELDS, WIDTH = [f"i{k}" for k in range(13)], [f"c{k}" for k in range(26)], 16


def mlp(*widths: int, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear maps with an activation between."""
    layers = [layer for pair in itertools.pairwise(widths) for layer in (nn.Linear(*pair), act())]
    return nn.Sequential(*layers[:-1])


class _Dots(nn.Module):
    """[B, m, D] → the products of all pairs of tokens, behind the first token or, if `compress`, X W with W [D, 4]."""

    def __init__(self, m: int, compress: bool) -> None:
        super().__init__()
        self.compress = nn.Linear(WIDTH, 4, bias=False) if compress else None
        self.places = nn.Buffer(torch.triu_indices(m, m, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        products = torch.bmm(x, x.mT)[:, self.places[0], self.places[1]]
        return torch.cat([self.compress(x).flatten(1) if self.compress else x[:, 0], products], 1)


class _DHENLayer(nn.Module):
    """[B, m, D] → [B, 16, D]: LayerNorm(dot + cross + linear + shortcut)."""

    def __init__(self, m: int) -> None:
        super().__init__()
        deep = nn.Linear(m * (m - 1) // 2 + 4 * m, 256), nn.SiLU(), nn.Linear(256, 16 * WIDTH, bias=False)
        self.dot = nn.Sequential(_Dots(m, True), *deep)
        self.cross = nn.Sequential(nn.Linear(m * WIDTH, 32, bias=False), nn.Linear(32, m * WIDTH))
        self.maps = nn.ParameterList(torch.randn(16, m) * m**-0.5 for _ in range(2 if m == 16 else 3))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        crossed = (x.flatten(1) * self.cross(x.flatten(1))).view_as(x)
        shortcut = self.maps[2] @ x if len(self.maps) > 2 else x
        return self.norm(self.dot(x).view_as(shortcut) + self.maps[0] @ crossed + self.maps[1] @ x + shortcut)


class Model(nn.Module):
    """dlrm, dcn or dhen: the dense token and those of 26 tables, [B, 27, 16], then the head."""

    def __init__(self, name: str, device: str = "meta") -> None:
        super().__init__()
        sizes = zip(FIELDS, ROWS, strict=True)
        tables = [EmbeddingBagConfig(rows, WIDTH, name=field, feature_names=[field]) for field, rows in sizes]
        self.tables = EmbeddingBagCollection(tables, device=torch.device(device))
        self.dense = mlp(len(DENSE), 256, 128, WIDTH, act=nn.SiLU if name == "dhen" else nn.ReLU)
        heads = {
            "dlrm": lambda: (_Dots(27, False), mlp(367, 256, 128, 64, 1)),
            "dcn": lambda: (nn.Flatten(), LowRankCrossNet(432, 3, 64), mlp(432, 256, 128, 64, 1)),
            "dhen": lambda: (_DHENLayer(27), _DHENLayer(16), nn.Flatten(), mlp(256, 512, 256, 128, 1, act=nn.SiLU)),
        }
        self.head = nn.Sequential(*heads[name]())

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss and the logits [B]."""
        found = self.tables(batch.sparse_features).to_dict()
        tokens = torch.stack([self.dense(batch.dense_features), *(found[field] for field in FIELDS)], 1)
        logits = self.head(tokens)[:, 0]
        return nn.functional.binary_cross_entropy_with_logits(logits, batch.labels), logits.detach()


def run(model: nn.Module, batches: Sequence[Batch], device: torch.device, steps: int, pipeline: str) -> Iterator[float]:
    """Rows per second of this process over `steps` steps, turn after turn; a warm-up comes first."""
    adagrad = {"optimizer": EmbOptimType.EXACT_ADAGRAD, "learning_rate": 0.02, "eps": 1e-8}  # fused into the tables
    sharded = DistributedModelParallel(model, device=device, sharders=[EmbeddingBagCollectionSharder(adagrad)])
    others = [weight for name, weight in sharded.named_parameters() if name not in sharded.fused_optimizer.params]
    kind = TrainPipelineBase if pipeline == "base" else TrainPipelineSparseDist
    pipe, source = kind(sharded, torch.optim.Adam(others, lr=0.001, fused=True), device), itertools.cycle(batches)
    for turn in itertools.count():
        started = time.perf_counter()
        for _ in range(steps):
            logits = pipe.progress(source)
        logits.sum().item()  # waits for a GPU
        if turn > 0:
            yield steps * len(logits) / (time.perf_counter() - started)


def read_batches(log: str, size: int, rank: int = 0, world_size: int = 1) -> list[Batch]:
    """The full batches of one process: every `world_size`-th of the log, in its order."""
    table, lengths = pq.read_table(log), torch.ones(len(FIELDS) * size, dtype=torch.int32)
    dense, ids, y = (torch.stack([torch.tensor(table[f].to_numpy()) for f in g]) for g in (DENSE, FIELDS, ["label"]))
    spans = [slice(i, i + size) for i in range(rank * size, len(table) - size + 1, world_size * size)]
    keyed = [KeyedJaggedTensor(FIELDS, ids[:, s].reshape(-1).long(), lengths=lengths) for s in spans]
    return [Batch(dense[:, s].T.contiguous(), k, y[0, s].float()) for s, k in zip(spans, keyed, strict=True)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group()
    data = read_batches(sys.argv[2], 4096, torch.distributed.get_rank(), torch.distributed.get_world_size())
    where = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    for rate in itertools.islice(run(Model(sys.argv[1]), data, where, 20, sys.argv[3]), 5):
        print(f"{rate:,.0f} rows/s", flush=True)
