"""What gradient balancing costs: seconds of a step (forward and backward) over those of the plain sum, as a Markdown table.

    python jobs/bench_balance.py [--rows 2048] [--rounds 25] [--tasks 2 5 7]

One thread, and time is the thread's CPU time. A figure is the median over rounds of a step's time over that of the plain sum
taken just before it; `sum, again` is the plain sum itself and tells the noise. `added by minnorm` is the share of its step
that goes into the tasks' gradients and their joining, timed within the step: it hardly knows of other work on the machine.
Optimisers are left out: they cost the same for all. `shared parameters` differentiates every task with respect to all of
trunk and tables, as methods do that need these gradients: it is the yardstick, and cannot train fused tables.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
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
    "sum, again": Supervised,
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


def seconds(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """CPU time of a call, and what it returns."""
    started = time.thread_time()
    value = function(*arguments)
    return time.thread_time() - started, value


def added_share(model: SharedBottom, objective: MultiBalance, batch: Batch) -> float:
    """The share of a step that is spent on the tasks' gradients through the head and on joining them."""
    added = 0.0

    def timed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*arguments: Tensor) -> Tensor:
            nonlocal added
            taken, value = seconds(function, *arguments)
            added += taken
            return value

        return call

    with mock.patch.multiple(objective, direction=timed(objective.direction), _gradients=timed(objective._gradients)):
        whole, _ = seconds(balanced_step, model, objective, batch)
    return added / whole


def measure(tasks: int, head: str, rows: int, rounds: int) -> dict[str, float]:
    """A column of the table: milliseconds of the plain sum, ratios to it, and a share."""
    schema = make_schema(tasks)
    batch = make_batch(schema, rows)
    model = SharedBottom(schema, embedding_dim=WIDTH, bottom=(64,), deep=DEEP, tower=TOWER, head=HEADS[head])
    steps = {name: partial(balanced_step, model, make(schema), batch) for name, make in OBJECTIVES.items()}
    steps["shared parameters"] = partial(shared_parameters_step, model, Supervised(schema), batch)
    plain, minnorm = partial(balanced_step, model, Supervised(schema), batch), MultiBalance(schema, warmup_steps=0)
    found: dict[str, list[float]] = defaultdict(list)
    for turn in range(rounds + 1):  # the first one warms up
        for name, step in steps.items():
            before, _ = seconds(plain)
            found["sum, ms"].append(1000 * before)
            found[name].append(seconds(step)[0] / before)
        found["added by minnorm"].append(added_share(model, minnorm, batch))
        if turn == 0:
            found.clear()
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048, help="rows of a batch")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 5, 7])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    columns = [(head, tasks) for head in HEADS for tasks in arguments.tasks]
    results = {column: measure(column[1], column[0], arguments.rows, arguments.rounds) for column in columns}
    print("| | " + " | ".join(f"{head}, {tasks} tasks" for head, tasks in columns) + " |")
    print("| --- |" + " --- |" * len(columns))
    for name in next(iter(results.values())):
        form = {"sum, ms": ".1f", "added by minnorm": ".1%"}.get(name, ".2f")
        print(f"| {name} | " + " | ".join(format(results[column][name], form) for column in columns) + " |")


if __name__ == "__main__":
    main()
