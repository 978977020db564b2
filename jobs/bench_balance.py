"""What gradient balancing costs: seconds of a step (forward and backward) over those of the plain sum, as a Markdown table.

    python jobs/bench_balance.py [--rows 2048] [--rounds 15] [--tasks 2 5 7]

One thread. Time is the thread's CPU time, so that other work on the machine counts little; the variants take turns, and a
figure is the median over rounds of the ratio to the plain sum of the same round. Optimisers are left out: they cost the
same for all. `shared parameters` differentiates every task with respect to all of trunk and tables, as methods do that
need these gradients: it is the yardstick, and cannot train fused tables.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from raysys.data.batch import Batch
from raysys.models.heads import Head
from raysys.models.multitask.mmoe import MMoE
from raysys.models.ranking.shared_bottom import SharedBottom
from raysys.objectives.multibalance import MultiBalance
from raysys.objectives.supervised import Supervised
from raysys.objectives.weighting import MGDA, GradNorm, PCGrad, Uncertainty
from raysys.schema import DenseFeature, FeatureSchema, Label, SparseFeature, Table

FEATURES, IDS, WIDTH, DENSE = 16, 1000, 16, 13
DEEP, TOWER, EXPERT = (1024, 512, 128), (32,), (64, 32)
HEADS: dict[str, Head | None] = {"towers": None, "mmoe": partial(MMoE, experts=4, widths=(EXPERT,))}
OBJECTIVES: dict[str, Callable[[FeatureSchema], Supervised]] = {
    "sum": Supervised,
    "minnorm": partial(MultiBalance, warmup_steps=0),
    "moco": partial(MultiBalance, rule="moco", warmup_steps=0),
    "normeq": partial(MultiBalance, rule="normeq", warmup_steps=0),
    "metabalance": partial(MultiBalance, rule="metabalance", warmup_steps=0),
    "mgda": MGDA,
    "pcgrad": PCGrad,
    "gradnorm": partial(GradNorm, warmup_steps=0),
    "uncertainty": Uncertainty,
}


def make_schema(tasks: int) -> FeatureSchema:
    """A click log of single ids and dense columns."""
    names = [f"feature{i}" for i in range(FEATURES)]
    return FeatureSchema(
        tables=tuple(Table(name, IDS, WIDTH) for name in names),
        dense=tuple(DenseFeature(f"dense{i}") for i in range(DENSE)),
        sparse=tuple(SparseFeature(name, name) for name in names),
        labels=tuple(Label(f"task{i}") for i in range(tasks)),
    )


def make_batch(schema: FeatureSchema, rows: int) -> Batch:
    """Random rows; every label is there."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, IDS, (FEATURES * rows,), generator=generator)
    sparse = KeyedJaggedTensor([f.name for f in schema.sparse], ids, lengths=torch.ones_like(ids).int())
    labels = torch.randint(0, 2, (rows, len(schema.tasks)), generator=generator).float()
    number, ones = torch.arange(rows), torch.ones_like(labels)
    dense = torch.randn(rows, DENSE, generator=generator)
    return Batch(dense, sparse, labels, ones.bool(), ones, number, number, number)


def balanced_step(model: SharedBottom, objective: Supervised, batch: Batch) -> None:
    """One forward and backward pass."""
    model.zero_grad()
    loss, _, _ = objective(model, batch, model.embed(batch))
    loss.backward()


def shared_parameters_step(model: SharedBottom, objective: Supervised, batch: Batch) -> None:
    """One forward pass and a backward pass for each task down to the tables."""
    model.zero_grad()
    losses = objective.task_losses(model(batch).logits, batch).per_task
    parameters = list(model.parameters())
    for loss in losses:
        torch.autograd.grad(loss, parameters, retain_graph=True)


def measure(tasks: int, head: str, rows: int, rounds: int) -> tuple[float, dict[str, float]]:
    """Median milliseconds of a step with the plain sum, and each variant's ratio to it."""
    schema = make_schema(tasks)
    batch = make_batch(schema, rows)
    model = SharedBottom(schema, embedding_dim=WIDTH, bottom=(64,), deep=DEEP, tower=TOWER, head=HEADS[head])
    steps = {name: partial(balanced_step, model, make(schema), batch) for name, make in OBJECTIVES.items()}
    steps["shared parameters"] = partial(shared_parameters_step, model, Supervised(schema), batch)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):  # the first two warm up
        for name, step in steps.items():
            started = time.thread_time()
            step()
            if turn >= 2:
                seconds[name].append(time.thread_time() - started)
    plain = seconds["sum"]
    ratios = {
        name: statistics.median(a / b for a, b in zip(values, plain, strict=True)) for name, values in seconds.items()
    }
    return 1000 * statistics.median(plain), ratios


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048, help="rows of a batch")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 5, 7])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    columns = [(head, tasks) for head in HEADS for tasks in arguments.tasks]
    results = {column: measure(column[1], column[0], arguments.rows, arguments.rounds) for column in columns}
    print("| | " + " | ".join(f"{head}, {tasks} tasks" for head, tasks in columns) + " |")
    print("| --- |" + " --- |" * len(columns))
    print("| sum, ms | " + " | ".join(f"{results[column][0]:.1f}" for column in columns) + " |")
    for name in [*OBJECTIVES, "shared parameters"][1:]:
        print(f"| {name} | " + " | ".join(f"{results[column][1][name]:.2f}" for column in columns) + " |")


if __name__ == "__main__":
    main()
