"""Check on one GPU what a machine without one cannot: `python jobs/gpu_check.py OUTPUT_FOLDER` (under 10 minutes).

Parity of CPU and CUDA, NCCL with one rank, the fused Adam, tables in host memory with a cache, bfloat16, both pipelines, a
checkpoint across devices, the speed of the presets, and what gpu_check_models.py has: every model, objective and dense
optimiser, and Ray Train. Prints a table and writes gpu_check.json; exit status 1 where a check failed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import bench_bare
import gpu_check_models
import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist

from raysys.data.log import ParquetLog
from raysys.data.reader import Reader
from raysys.data.synthetic import prepare_criteo_shaped
from raysys.data.transforms import Transforms
from raysys.models.ranking.dcn import DCNv2
from raysys.models.ranking.dhen import DHEN
from raysys.models.ranking.dlrm import DLRM
from raysys.nn.collectives import gather_with_grad
from raysys.objectives.supervised import Supervised
from raysys.schema import FeatureSchema
from raysys.train.checkpoint import load_tensors, save_checkpoint
from raysys.train.job import versions
from raysys.train.metrics import Evaluator
from raysys.train.optimizers import DenseOptimizer, Optimizers, OptimizerSettings, build_optimizers
from raysys.train.plan import ShardingSettings, plan_tables
from raysys.train.plan_checks import TableSharding
from raysys.train.sharding import shard, unwrap
from raysys.train.sparse_optimizers import SparseOptimizer
from raysys.train.state import dense_tensors
from raysys.train.step import Precision, TrainStep
from raysys.train.tables import gather_table, table_weights

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
MODELS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "DLRM": (DLRM, {"embedding_dim": 16}),
    "DCNv2": (DCNv2, {"embedding_dim": 16, "rank": 64}),
    "DHEN": (DHEN, {"embedding_dim": 16, "layers": 2}),
}
STEPS, BATCH = 20, 8192
SPEEDS: tuple[tuple[str, Precision], ...] = (
    ("base", "float32"),
    ("sparse_dist", "float32"),
    ("sparse_dist", "bfloat16"),
)


@dataclass(frozen=True)
class Setup:
    """One way to train: what a check varies."""

    model: str = "DHEN"
    device: torch.device = CUDA
    sparse: SparseOptimizer = field(default_factory=SparseOptimizer)
    kernels: tuple[str, ...] = ()
    pipeline: str = "base"
    precision: Precision = "float32"


class Checks:
    """The data of all checks and their results."""

    def __init__(self, folder: Path) -> None:
        prepare_criteo_shaped(folder, rows=30 * BATCH)
        self.schema = FeatureSchema.load(folder / "schema.yaml")
        self.train_path = str(folder / "train")
        log = ParquetLog(self.train_path, self.schema)
        self.transforms = Transforms.fit(self.schema, log)
        reader = Reader(log, self.transforms, BATCH, prefetch=0)
        self.batches = [batch for batch, _ in reader.epoch() if len(batch) == BATCH][:STEPS]
        self.results: list[dict[str, Any]] = []

    def check(self, name: str, run: Callable[[], dict[str, Any]], limit: float | None = None) -> None:
        """Run one check; it fails by an exception, or by a `difference` above `limit`."""
        started = time.monotonic()
        try:
            figures = run()
            passed = limit is None or figures["difference"] <= limit
        except Exception:
            traceback.print_exc()
            figures, passed = {"error": traceback.format_exc().splitlines()[-1]}, False
        seconds = time.monotonic() - started
        self.results.append({"check": name, "passed": passed, "limit": limit, "seconds": seconds, **figures})
        print(f"{'ok  ' if passed else 'FAIL'} {name:<45} {json.dumps(figures, default=str)[:150]}", flush=True)

    def build(self, setup: Setup) -> tuple[Any, Optimizers]:
        """A sharded model with one rank and its optimisers."""
        kind, arguments = MODELS[setup.model]
        step = TrainStep(
            kind(self.schema, device="meta", **arguments), Supervised(self.schema), precision=setup.precision
        )
        tables = {
            table.name: TableSharding(sharding_types=("table_wise",), compute_kernels=setup.kernels)
            for table in self.schema.tables
        }
        optimizers = OptimizerSettings(sparse=setup.sparse, dense=DenseOptimizer("adam", lr=1e-3))
        plan = plan_tables(step, 1, setup.device.type, BATCH, ShardingSettings(tables=tables), optimizers)
        model = shard(step, plan, setup.device, optimizers)
        return model, build_optimizers(model, optimizers, STEPS)

    def train(self, setup: Setup) -> tuple[Any, torch.Tensor]:
        """Train on all batches; the model and the losses [STEPS]."""
        model, optimizers = self.build(setup)
        pipeline = make_pipeline(setup.pipeline, model, optimizers, setup.device)
        losses, batches = [], iter(self.batches)
        for _ in self.batches:
            losses.append(pipeline.progress(batches)["losses"]["loss"])
        return model, torch.stack(losses).cpu()

    def parity(self, a: Setup, b: Setup) -> dict[str, Any]:
        """The largest relative difference of the losses of two ways to train."""
        losses = []
        for setup in (a, b):
            with process_group(setup.device):
                losses.append(self.train(setup)[1])
        difference = ((losses[0] - losses[1]).abs() / losses[0].abs()).max()
        return {"difference": float(difference), "first_loss": float(losses[0][0]), "last_loss": float(losses[0][-1])}

    def collectives(self) -> dict[str, Any]:
        """Evaluation and the differentiable gather under NCCL agree with what the CPU gives."""
        metrics = {}
        for device in (CPU, CUDA):
            with process_group(device):
                model, _ = self.train(Setup(device=device))
                evaluator, ranker = Evaluator(self.schema), unwrap(model).model.eval()
                with torch.no_grad():
                    for batch in self.batches:
                        evaluator.update(ranker(batch.to(device)).logits, batch)
                metrics[device.type] = evaluator.compute()["tasks"]["label"]
                value = torch.ones(4, 3, device=device, requires_grad=True)
                gather_with_grad(value).square().sum().backward()
                assert value.grad is not None
                assert bool((value.grad == 2).all())
        return {"difference": abs(metrics["cpu"]["auc"] - metrics["cuda"]["auc"]), **metrics}

    def checkpoint(self, folder: Path) -> dict[str, Any]:
        """Weights that were saved on CUDA load on the CPU bit for bit."""
        with process_group(CUDA):
            model, _ = self.train(Setup())
            tensors = {"dense": dense_tensors(model), "tables": table_weights(model)}
            size = save_checkpoint(folder, tensors, {}, lambda _: None)
            saved = tables_of(model)
        with process_group(CPU):
            model, _ = self.build(Setup(device=CPU))
            load_tensors(folder, {"dense": dense_tensors(model), "tables": table_weights(model)})
            loaded = tables_of(model)
        differences = [(saved[name] - loaded[name]).abs().max() for name in saved]
        return {"difference": float(torch.stack(differences).max()), "bytes": size}

    def speed(self, model: str, pipeline: str, precision: Precision) -> dict[str, Any]:
        """Rows per second from batches in host memory, beside the bare loop: medians of 5 turns each, taken in turn."""
        bare_name = {"DLRM": "dlrm", "DCNv2": "dcn", "DHEN": "dhen"}[model]
        with process_group(CUDA):
            bare_batches = [batch.pin_memory() for batch in bench_bare.read_batches(self.train_path, BATCH)[:STEPS]]
            bare = bench_bare.run(bench_bare.Model(bare_name), bare_batches, CUDA, STEPS, pipeline)
            own = self.turns(Setup(model=model, pipeline=pipeline, precision=precision))
            rates = [(next(own), next(bare)) for _ in range(5)]
        own_rate, bare_rate = (median(column) for column in zip(*rates, strict=True))
        return {"rows_per_second": round(own_rate), "bare": round(bare_rate), "ratio": round(own_rate / bare_rate, 3)}

    def turns(self, setup: Setup) -> Iterator[float]:
        """Rows per second, turn after turn of STEPS steps, after a warm-up."""
        model, optimizers = self.build(setup)
        pipeline = make_pipeline(setup.pipeline, model, optimizers, setup.device)
        batches = itertools.cycle([batch.pin_memory() for batch in self.batches])
        for turn in itertools.count():
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(STEPS):
                pipeline.progress(batches)
            torch.cuda.synchronize()
            if turn > 0:
                yield STEPS * BATCH / (time.perf_counter() - started)


def make_pipeline(
    kind: str, model: Any, optimizers: Optimizers, device: torch.device
) -> TrainPipelineBase | TrainPipelineSparseDist:
    """One of TorchRec's pipelines over our optimisers."""

    class Stepper:
        step_number = 0

        def zero_grad(self) -> None:
            optimizers.zero_grad()

        def step(self) -> None:
            optimizers.step(self.step_number)
            self.step_number += 1

    if kind == "sparse_dist":
        return TrainPipelineSparseDist(model, Stepper(), device, pipeline_postproc=True)
    return TrainPipelineBase(model, Stepper(), device)


def tables_of(model: Any) -> dict[str, torch.Tensor]:
    """The whole tables of a model on one rank, on the CPU."""
    tables = {}
    for name, value in table_weights(model).items():
        table = gather_table(value)
        assert table is not None  # this is rank 0
        tables[name] = table
    return tables


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """One rank: NCCL for CUDA, gloo for the CPU."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def main() -> int:
    """Run all checks; 0 where all passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available():
        print("error: no CUDA device\n  hint: run this on a machine with a GPU", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    with tempfile.TemporaryDirectory() as temporary:
        checks = Checks(Path(temporary) / "data")
        for model in MODELS:
            checks.check(
                f"{model}: CPU and CUDA, Adagrad", partial(checks.parity, Setup(model, CPU), Setup(model)), 1e-3
            )
        rowwise, adam = SparseOptimizer("rowwise_adagrad", lr=0.02), SparseOptimizer("adam", lr=1e-3)
        checks.check(
            "row-wise Adagrad: CPU and CUDA",
            lambda: checks.parity(Setup(device=CPU, sparse=rowwise), Setup(sparse=rowwise)),
            1e-3,
        )
        checks.check("fused Adam trains", lambda: trains(checks, Setup(sparse=adam)))
        cached = Setup(kernels=("fused_uvm_caching",))
        checks.check("tables in host memory with a cache", lambda: checks.parity(Setup(), cached), 1e-5)
        checks.check(
            "pipelines: base and sparse_dist", lambda: checks.parity(Setup(), Setup(pipeline="sparse_dist")), 1e-5
        )
        checks.check("bfloat16 autocast", lambda: checks.parity(Setup(), Setup(precision="bfloat16")), 2e-2)
        checks.check("NCCL: evaluation and gather", checks.collectives, 1e-3)
        checks.check("checkpoint from CUDA to CPU", lambda: checks.checkpoint(Path(temporary) / "step"), 0.0)
        for model in MODELS:
            for pipeline, precision in SPEEDS:
                name = f"speed of {model}, {pipeline}, {precision}"
                checks.check(name, partial(checks.speed, model, pipeline, precision))
        for name, run in gpu_check_models.checks(Path(temporary) / "models", CUDA.type):
            checks.check(name, run, gpu_check_models.LIMIT)
    device = {"device": torch.cuda.get_device_name(), "versions": versions(), "batch": BATCH}
    (output / "gpu_check.json").write_text(json.dumps(device | {"checks": checks.results}, indent=1, default=str))
    failed = [result["check"] for result in checks.results if not result["passed"]]
    print(f"{device['device']}: {len(checks.results) - len(failed)} of {len(checks.results)} checks passed")
    return 1 if failed else 0


def trains(checks: Checks, setup: Setup) -> dict[str, Any]:
    """The loss falls and every table moves."""
    with process_group(setup.device):
        before = tables_of(checks.build(setup)[0])
        model, losses = checks.train(setup)
        after = tables_of(model)
    still = [name for name in before if torch.equal(before[name], after[name])]
    if still or not losses[-1] < losses[0]:
        raise AssertionError(f"tables that did not move: {still}; losses {losses[0]:.4f} to {losses[-1]:.4f}")
    return {"first_loss": float(losses[0]), "last_loss": float(losses[-1])}


if __name__ == "__main__":
    sys.exit(main())
