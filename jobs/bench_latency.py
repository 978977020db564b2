"""Measure how long one answer of Hiformer and of its simpler forms takes: a table, and OUT/latency.json.

The sizes are those of the paper (arXiv 2311.05884): 31 categorical and 30 dense features, one task, 38 tokens of width 128.
All models answer in turns, so what else the machine does hits all alike. There is one thread: on a quiet machine its CPU
time is the wall clock's, on a busy one it says more.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import bench_result
import torch
from bench_rival import THREADS
from rich.console import Console
from rich.table import Table

from raysys.models.flops import flops_per_row, full_batch
from raysys.models.ranking.hiformer import Hiformer
from raysys.report.format import count
from raysys.schema import DenseFeature, FeatureSchema, Label, SparseFeature
from raysys.schema import Table as SchemaTable
from raysys.strict_json import to_plain

ROWS = (1, 512)
SIZES: dict[str, Any] = {
    "embedding_dim": 128,
    "heads": 4,
    "key_dim": 16,
    "value_dim": 64,
    "d_ff": 512,
    "dense_per_token": 5,
    "prune": False,
}
LOW = {"key_rank": 128, "value_rank": 1024}
FULL = {"key_rank": None, "value_rank": None}
MODELS: dict[str, dict[str, Any]] = {
    "vanilla Transformer": {"attention": "vanilla"},
    "heterogeneous": {"attention": "heterogeneous"},
    "Hiformer, full rank": FULL,
    "Hiformer, low rank": LOW,
    "vanilla Transformer, pruned": {"attention": "vanilla", "prune": True},
    "heterogeneous, pruned": {"attention": "heterogeneous", "prune": True},
    "Hiformer, full rank, pruned": {**FULL, "prune": True},
    "Hiformer, low rank, pruned": {**LOW, "prune": True},
}
BASE = "vanilla Transformer"
TINY = {"embedding_dim": 16, "heads": 2, "key_dim": 4, "value_dim": 8, "d_ff": 32}
TINY_LOW = {"key_rank": 8, "value_rank": 16}


def schema_of(features: int, dense: int, width: int) -> FeatureSchema:
    """`features` single ids, each with a table of 1000 rows, and `dense` columns, for one task."""
    names = [f"c{number}" for number in range(features)]
    return FeatureSchema(
        tables=tuple(SchemaTable(name, 1000, width) for name in names),
        sparse=tuple(SparseFeature(name, name) for name in names),
        dense=tuple(DenseFeature(f"x{number}") for number in range(dense)),
        labels=(Label("install"),),
    )


def take_turns(
    models: Mapping[str, Callable[[Any], object]], batch: Any, rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds of each model's answers by the wall clock and of CPU time, after two rounds that warm up."""
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    with torch.inference_mode():
        for number in range(rounds + 2):
            for name, model in models.items():
                wall, cpu = time.perf_counter(), time.thread_time()
                model(batch)
                elapsed = (time.perf_counter() - wall) * 1000, (time.thread_time() - cpu) * 1000
                if number >= 2:
                    turns[name].append(elapsed)
    return turns


def measure(quick: bool, rounds: Mapping[int, int]) -> list[dict[str, Any]]:
    """One row a model: its size and the medians by the number of rows that it answers at once."""
    schema = schema_of(3, 6, 16) if quick else schema_of(31, 30, 128)
    found, models = [], {}
    for name, keys in MODELS.items():
        arguments = {**SIZES, **keys}
        if quick:
            arguments |= TINY | (TINY_LOW if keys.get("key_rank") else {})
        model = models[name] = Hiformer(schema, **arguments).eval()
        dense = sum(p.numel() for key, p in model.named_parameters() if "embeddings." not in key)
        flops = flops_per_row(partial(Hiformer, **arguments), schema)
        found.append({"model": name, "dense_parameters": dense, "flops_per_row": flops})
    for rows in ROWS:
        turns = take_turns(models, full_batch(schema, rows), rounds[rows])
        for row in found:
            own, base = turns[str(row["model"])], turns[BASE]
            row[f"wall_{rows}"], row[f"cpu_{rows}"] = (median(times) for times in zip(*own, strict=True))
            row[f"ratio_{rows}"] = median(a / b for (_, a), (_, b) in zip(own, base, strict=True))
            row[f"turns_{rows}"] = own
    return found


def show(found: list[dict[str, Any]], about: dict[str, Any], console: Console) -> None:
    """The table."""
    console.print(
        f"{about['processor']}, {about['cpus']} cores, {about['threads_per_process']} thread, load {about['load_before']:.1f} "
        f"before and {about['load_after']:.1f} after; medians in milliseconds by the wall clock, of CPU time, and CPU time over that of the first model"
    )
    table = Table(box=None, header_style="bold")
    for title in ("model", "dense parameters", "FLOPs a row", "1 row", "512 rows"):
        table.add_column(title, no_wrap=True, justify="left" if title == "model" else "right")
    for row in found:
        sizes = [count(row[key]) for key in ("dense_parameters", "flops_per_row")]
        times = [f"{row[f'wall_{rows}']:.2f} | {row[f'cpu_{rows}']:.2f} | {row[f'ratio_{rows}']:.2f}" for rows in ROWS]
        table.add_row(row["model"], *sizes, *times)
    console.print(table)


def main() -> None:
    """Measure, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of latency.json")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only to see that it works")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(THREADS)
    rounds = {rows: 3 for rows in ROWS} if options.quick else {1: 200, 512: 7}
    about = bench_result.machine()
    found = measure(options.quick, rounds)
    about["load_after"] = os.getloadavg()[0]
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "latency.json"
    path.write_text(json.dumps(to_plain({**about, "rounds": rounds, "rows": found}), indent=1) + "\n")
    console = Console(width=None if sys.stdout.isatty() else 150)
    show(found, about, console)
    console.print(str(path), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
