"""Measure what raysys adds to each ranking model of configs/model: a table, and OUT/rankers.json.

Training: rows per second of raysys's train loop over those of a bare loop over the same module. Inference: the bare
module's time for an encoded batch over that of the module in an exported bundle; and the bundle's whole answer from raw
rows, for information. All of it is in one process and one thread, the reader's thread apart. Both sides take turns, and a
ratio is the median of the turns' ratios: by the wall clock, and in CPU time, which says more where other work is going on.

Sizes of the models are those of configs/compare.yaml, where it has the model.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import bench_result
import torch
from bench_latency import ROWS, take_turns
from bench_ranker_loops import SETTLE, Turn, keys_of_turns, train_in_turns
from bench_rival import THREADS
from rich.console import Console
from rich.table import Table

from raysys.bundle import Bundle, load_bundle, write_bundle
from raysys.config import Config, compose, config_folder, instantiate
from raysys.data.batch import Batch
from raysys.report.format import compact
from raysys.strict_json import to_plain
from raysys.train.job import Job
from raysys.train.trainer import prepare

TARGET = 0.9


@dataclass(frozen=True)
class Sizes:
    """How much is measured. steps: of a turn; rounds: turns of training; answers: turns of inference by rows."""

    folder: str
    log_rows: int
    batch_size: int
    steps: int
    rounds: int
    answers: dict[int, int]


FULL = Sizes("data/synthetic-rankers", 240_000, 2048, 20, 15, {1: 200, 512: 30})
QUICK = Sizes("data/synthetic-rankers-quick", 1_200, 64, 5, 2, {1: 3, 512: 3})


def models() -> dict[str, list[str]]:
    """The overrides of every model of configs/model: what the comparison trains, or else the defaults with a small `bottom`."""
    found: dict[str, list[str]] = {}
    for comparison in compose(name="compare")["comparisons"].values():
        found = comparison["models"] | found
    names = sorted(path.stem for path in (config_folder() / "model").glob("*.yaml"))
    return {name: found.get(name, [f"model={name}", "model.bottom=[32]"]) for name in names}


def config_of(name: str, sizes: Sizes, runs: Path, overrides: list[str]) -> Config:
    """A training run of a model on the data set that all share: three binary tasks, every label there, and a history."""
    keys = {
        "data": "synthetic",
        "data.folder": sizes.folder,
        "data.prepare.rows": sizes.log_rows,
        "data.prepare.processes": 1,
        "data.prepare.spec.funnel": "[]",
        "runs_folder": runs,
        "run_id": name,
        "train.batch_size": sizes.batch_size,
        "train.optimizers.dense.name": "adamw",
        **keys_of_turns(sizes.steps, sizes.rounds),
    }
    return compose([*(f"{key}={value}" for key, value in keys.items()), *overrides])


def measure(name: str, sizes: Sizes, runs: Path, overrides: list[str]) -> dict[str, Any]:
    """One row of the table; the data set is there."""
    prepared = prepare(config_of(name, sizes, runs, overrides))
    turns = train_in_turns(prepared, sizes.steps, sizes.rounds)
    facts = prepared.facts
    row = {"model": name, "overrides": overrides, "dense_parameters": facts["parameters"]["dense"]}
    row |= {"flops_per_row": facts["flops_per_row"], "training": _training(turns, sizes)}
    return row | {"inference": _inference(prepared.job, sizes, runs / f"{name}-bundle")}


def _training(turns: list[Turn], sizes: Sizes) -> dict[str, Any]:
    rows = (sizes.steps - SETTLE) * sizes.batch_size
    sides = {side: [getattr(turn, side) for turn in turns] for side in ("raysys", "bare")}
    return {
        "rows_per_second": {side: rows / median(turn.wall for turn in taken) for side, taken in sides.items()},
        "ratio": median(turn.bare.wall / turn.raysys.wall for turn in turns),
        "cpu_ratio": median(turn.bare.cpu / turn.raysys.cpu for turn in turns),
        "turns": [asdict(turn) for turn in turns],
    }


def _inference(job: Job, sizes: Sizes, folder: Path) -> dict[int, Any]:
    """By the number of rows that are answered at once."""
    bare = job.model("cpu").eval()
    model = job.config["model"] | {"seed": job.seed}
    bundle = load_bundle(write_bundle(folder, model, job.schema, job.transforms, bare.state_dict(), {}, {}))
    log = next(job.log("train").iter_batches(batch_size=max(ROWS)))
    found: dict[int, Any] = {}
    for rows in ROWS:
        raw = log.slice(0, rows)
        batch = bundle.transforms.to_batch(raw, labels=False)
        with torch.inference_mode():
            # Not to the bit: its weights stand elsewhere in memory, which changes the order of a sum.
            torch.testing.assert_close(bundle.model(batch).logits, bare(batch).logits, rtol=1e-4, atol=1e-5)
        answer = _answer_to(bundle, raw)
        times = take_turns({"bundle": bundle.model, "bare": bare, "from_rows": answer}, batch, sizes.answers[rows])
        walls = {side: median(wall for wall, _ in taken) for side, taken in times.items()}
        pairs = list(zip(times["bare"], times["bundle"], strict=True))
        ratios = [median(bare[clock] / own[clock] for bare, own in pairs) for clock in (0, 1)]
        found[rows] = {"milliseconds": walls, "ratio": ratios[0], "cpu_ratio": ratios[1], "turns": times}
    return found


def _answer_to(bundle: Bundle, raw: Any) -> Callable[[Batch], object]:
    return lambda _: bundle.predict(raw)


def met(row: dict[str, Any]) -> bool:
    """Whether training and inference reach the target."""
    return min(row["training"]["ratio"], *(found["ratio"] for found in row["inference"].values())) >= TARGET


def show(found: list[dict[str, Any]], about: dict[str, Any], console: Console) -> None:
    """The table."""
    console.print(
        f"{about['processor']}, {about['cpus']} cores, {about['threads_per_process']} thread and the reader's, "
        f"load {about['load_before']:.1f} before and {about['load_after']:.1f} after\n"
        "training: rows/s of raysys | the bare loop | ratio | ratio of CPU time; inference: milliseconds of the bundle's "
        f"module | ratio to the bare one | of CPU time | milliseconds from raw rows; target of the ratios: {TARGET}"
    )
    table = Table(box=None, header_style="bold")
    for title in ("model", "dense", "FLOPs", "training", "1 row", "512 rows", ""):
        table.add_column(title, no_wrap=True, justify="left" if title in ("model", "") else "right")
    for row in found:
        training = row["training"]
        rates = [compact(training["rows_per_second"][side]) for side in ("raysys", "bare")]
        cells = [" | ".join([*rates, f"{training['ratio']:.2f}", f"{training['cpu_ratio']:.2f}"])]
        for inference in row["inference"].values():
            times = inference["milliseconds"]
            ratios = f"{inference['ratio']:.2f} | {inference['cpu_ratio']:.2f}"
            cells.append(f"{times['bundle']:.2f} | {ratios} | {times['from_rows']:.2f}")
        sizes = [compact(row[key]) for key in ("dense_parameters", "flops_per_row")]
        table.add_row(row["model"], *sizes, *cells, "[green]met[/]" if met(row) else "[red]missed[/]")
    console.print(table)


def main() -> None:
    """Measure, print the table; the JSON is written again after each model."""
    known = models()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(known), help="some of them: adatt,hiformer")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of rankers.json")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only to see that it works")
    options = parser.parse_args()
    names = options.models.split(",")
    if unknown := set(names) - known.keys():
        parser.error(f"no model {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    sizes = QUICK if options.quick else FULL
    torch.set_num_threads(THREADS)
    console = Console(width=None if sys.stdout.isatty() else 180)
    about, found = bench_result.machine() | {"settings": asdict(sizes)}, []
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "rankers.json"
    with tempfile.TemporaryDirectory(prefix="bench") as runs:
        instantiate(config_of("data", sizes, Path(runs), [])["data"]["prepare"])  # all models share it
        for name in names:
            console.print(f"measuring {name}")
            found.append(measure(name, sizes, Path(runs), known[name]))
            gc.collect()  # sharded models are cycles
            about["load_after"] = os.getloadavg()[0]
            path.write_text(json.dumps(to_plain({**about, "rows": found}), indent=1) + "\n")
    show(found, about, console)
    console.print(str(path), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # TorchRec warns of every table
    warnings.simplefilter("ignore")
    main()
