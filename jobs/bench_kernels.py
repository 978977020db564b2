"""What share of a training step the arithmetic has: matrix products, softmax, look-ups. A table, and OUT/kernels.json.

For AdaTT and Hiformer in the sizes of configs/model, on the data set of `bench_rankers.py`, with one thread: the whole step
of raysys's train loop (reader, objective, optimisers, metrics), and forward and backward of the bare module alone. A share
is the time within the kernels named in `KERNELS`, without what they call, over the wall clock's time of the steps, both
with the profiler running, which makes everything around the kernels look longer than it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import tempfile
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_profile import WHOLE, Recording
from bench_ranker_loops import SETTLE, BareLoop, full_batches
from bench_rankers import FULL, QUICK, Sizes, config_of
from bench_rival import THREADS
from rich.console import Console
from rich.table import Table

from raysys.config import instantiate
from raysys.report.format import number
from raysys.strict_json import to_plain
from raysys.train.launch import Worker, launch
from raysys.train.loop import TrainLoop
from raysys.train.trainer import Prepared, prepare

FORMS = {
    "AdaTT": ["model=adatt"],
    "Hiformer": ["model=hiformer"],
    "Hiformer, heterogeneous": ["model=hiformer", "model.attention=heterogeneous"],
}
KERNELS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mv", "aten::addmv", "aten::dot"),
    "softmax": ("aten::_softmax", "aten::_softmax_backward_data"),  # of attention and of gates
    "look-ups": (
        "fbgemm::split_embedding_codegen_forward_cpu",
        "fbgemm::split_embedding_backward_codegen_adagrad_cpu",
        "fbgemm::split_embedding_nobag_codegen_forward_cpu",
        "fbgemm::split_embedding_nobag_backward_codegen_adagrad_cpu",
    ),
}
BATCH_ROWS, TARGET = 2048, 0.6


def shares(table: Mapping[str, float]) -> dict[str, float]:
    """The share of each class of kernels in a step, and of all of them together."""
    found = {kind: sum(table.get(name, 0.0) for name in names) / table[WHOLE] for kind, names in KERNELS.items()}
    return found | {"together": sum(found.values())}


def record(worker: Worker, prepared: Prepared, steps: int) -> dict[str, dict[str, float]]:
    """Tables of operators over `steps` steps, after as many to warm up: of the train loop, and of forward and backward."""
    recordings: list[Recording] = []
    tables: dict[str, dict[str, float]] = {}

    def emit(event: dict[str, Any]) -> None:
        if event["event"] != "step":
            return
        if recordings:
            tables["train step"] = recordings[0].stop()
        else:
            recordings.append(Recording(steps))

    loop = TrainLoop(dataclasses.replace(worker, emit=emit), prepared.plan)
    bare = BareLoop(prepared, full_batches(loop, steps))
    bare.start_from(loop.model)
    loop.run()
    for _ in range(SETTLE):
        bare.step()
    recording = Recording(steps)
    for _ in range(steps):
        bare.backward()
    return tables | {"forward and backward": recording.stop()}


def measure(sizes: Sizes, runs: Path) -> dict[str, dict[str, Any]]:
    """By form of model and part of the step: the shares, and the table of operators in milliseconds of a step."""
    found: dict[str, dict[str, Any]] = {}
    instantiate(config_of("data", sizes, runs, [])["data"]["prepare"])  # all forms share it
    for place, (form, overrides) in enumerate(FORMS.items()):
        prepared = prepare(config_of(f"form-{place}", sizes, runs, overrides))
        tables = launch(prepared.job, partial(record, prepared=prepared, steps=sizes.steps), lambda _: None, False)
        found[form] = {part: {"shares": shares(table), "milliseconds": table} for part, table in tables.items()}
    return found


def show(found: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """The table."""
    table = Table(box=None, header_style="bold")
    for title in ("model", "part", *KERNELS, "together", "milliseconds"):
        table.add_column(title, justify="left" if title in ("model", "part") else "right")
    for form, parts in found.items():
        for part, recorded in parts.items():
            cells = [number(share, 2) for share in recorded["shares"].values()]
            table.add_row(form, part, *cells, number(recorded["milliseconds"][WHOLE], 1))
    console.print(table)
    console.print(f"target: together at least {TARGET}")


def main() -> None:
    """Record, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of kernels.json")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only to see that it works")
    options = parser.parse_args()
    sizes = QUICK if options.quick else FULL
    sizes = dataclasses.replace(sizes, rounds=1, batch_size=QUICK.batch_size if options.quick else BATCH_ROWS)
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory(prefix="bench") as runs:
        found = measure(sizes, Path(runs))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "kernels.json"
    path.write_text(json.dumps(to_plain(found), indent=1) + "\n")
    console = Console(width=120)
    show(found, console)
    console.print(str(path), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # TorchRec warns of every table
    warnings.simplefilter("ignore")
    main()
