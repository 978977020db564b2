"""Measure what compiling the dense part of a ranker, from tokens to logits, gains in serving: a table, and OUT/compile.json.

Forms: as it is; traced and frozen (torch.jit); torch.compile for sizes that vary and for each size; torch.export with
AOTInductor, as `raysys.serve.compiled` has it. The models are a DHEN and a DCN v2 of default size on 26 single ids and 13 dense
columns. All forms answer in turns, so what else the machine does hits all alike. There is one thread: on a quiet machine its CPU
time is the wall clock's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import bench_result
import torch
from bench_latency import schema_of, take_turns
from bench_rival import THREADS
from rich.console import Console
from rich.table import Table
from torch import Tensor

from raysys.models.ranking.base import RankingModel
from raysys.models.ranking.dcn import DCNv2
from raysys.models.ranking.dhen import DHEN
from raysys.serve.compiled import DensePart, Outputs, compile_part
from raysys.strict_json import to_plain

Inputs = tuple[Tensor, Tensor]
Form = Callable[..., Outputs]
EAGER = "eager"
IDS, DENSE = 26, 13


def frozen(part: DensePart, inputs: Mapping[int, Inputs]) -> Form:
    """Traced, frozen, and called until the profiling executor has specialised it."""
    traced = torch.jit.trace(part, inputs[max(inputs)], check_trace=False)
    form = torch.jit.optimize_for_inference(torch.jit.freeze(traced))
    for _ in range(2):
        for given in inputs.values():
            form(*given)
    return form


def compiled(part: DensePart, inputs: Mapping[int, Inputs], dynamic: bool) -> Form:
    """By torch.compile, called with every size."""
    form = torch.compile(part, dynamic=dynamic)
    for given in inputs.values():
        form(*given)
    return form


def ahead_of_time(part: DensePart, inputs: Mapping[int, Inputs]) -> Form:
    """By AOTInductor, as serving has it, called with every size."""
    with torch.inference_mode(False):
        form = compile_part(part, inputs[max(inputs)])
    for given in inputs.values():
        form(*given)
    return form


FORMS: dict[str, Callable[[DensePart, Mapping[int, Inputs]], Form]] = {
    EAGER: lambda part, inputs: part,
    "torch.jit, frozen": frozen,
    "AOTInductor": ahead_of_time,
    "torch.compile, sizes vary": lambda part, inputs: compiled(part, inputs, dynamic=True),
    "torch.compile, each size": lambda part, inputs: compiled(part, inputs, dynamic=False),
}
QUICK = 3  # so many of them are fast to build


def inputs_of(rows: int, width: int) -> Inputs:
    """Tokens and dense columns as large as those of a trained model."""
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, IDS, width, generator=generator) / 10, torch.randn(rows, DENSE, generator=generator)


def measure(model: RankingModel, rounds: Mapping[int, int], num_forms: int) -> list[dict[str, Any]]:
    """One row a form: seconds until it has answered every size, the largest error, medians of latency by rows."""
    schema = schema_of(IDS, DENSE, model.embedding_dim)
    torch.compiler.reset()  # dynamo keeps at most 8 forms of the one `forward` that all models share
    part = DensePart(model, tuple(feature.name for feature in schema.sparse)).eval()
    inputs = {rows: inputs_of(rows, model.embedding_dim) for rows in rounds}
    found: list[dict[str, Any]] = []
    forms = {}
    with torch.inference_mode():
        expected = {rows: part(*given)[0] for rows, given in inputs.items()}
        for name, build in list(FORMS.items())[:num_forms]:
            started = time.perf_counter()
            forms[name] = build(part, inputs)
            ready = time.perf_counter() - started
            error = max(
                float((forms[name](*inputs[rows])[0] - logits).abs().max()) for rows, logits in expected.items()
            )
            found.append({"form": name, "ready_s": ready, "error": error})
    for rows, given in inputs.items():
        answers = {name: lambda _, form=form, given=given: form(*given) for name, form in forms.items()}
        turns = take_turns(answers, given, rounds[rows])
        for row in found:
            own, base = turns[row["form"]], turns[EAGER]
            row[f"wall_{rows}"], row[f"cpu_{rows}"] = (median(times) for times in zip(*own, strict=True))
            row[f"gain_{rows}"] = median(b / a for (_, a), (_, b) in zip(own, base, strict=True))
    return found


def show(found: Mapping[str, list[dict[str, Any]]], about: dict[str, Any], console: Console) -> None:
    """The table."""
    console.print(
        f"{about['processor']}, {about['cpus']} cores, {about['threads_per_process']} thread, load {about['load_before']:.1f} "
        f"before and {about['load_after']:.1f} after; medians in milliseconds of CPU time, and how many times faster than eager"
    )
    table = Table(box=None, header_style="bold")
    sizes = [int(size) for size in about["rounds"]]
    for title in ("model", "form", "ready in", "largest error", *(f"{rows} rows" for rows in sizes)):
        table.add_column(title, no_wrap=True, justify="left" if title in ("model", "form") else "right")
    for model, rows in found.items():
        for row in rows:
            times = [f"{row[f'cpu_{size}']:.2f} | {row[f'gain_{size}']:.2f}" for size in sizes]
            table.add_row(model, row["form"], f"{row['ready_s']:.1f} s", f"{row['error']:.1e}", *times)
    console.print(table)


def main() -> None:
    """Measure, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of compile.json")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, the faster forms: only to see that it works")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(THREADS)
    torch._inductor.config.force_disable_caches = True  # else a second run finds the work of the first
    rounds = {1: 3, 5: 3} if options.quick else {1: 301, 32: 301, 200: 301, 512: 61}
    sizes: dict[str, Any] = {"layers": 1, "tokens_out": 2, "hidden": (), "tower": (4,)} if options.quick else {}
    models: dict[str, Callable[[], RankingModel]]
    models = {"DHEN": lambda: DHEN(schema_of(IDS, DENSE, 64), embedding_dim=64, **sizes)}
    if not options.quick:
        models["DCN v2"] = lambda: DCNv2(schema_of(IDS, DENSE, 16))
    about = bench_result.machine() | {"rounds": rounds}
    found = {name: measure(build(), rounds, QUICK if options.quick else len(FORMS)) for name, build in models.items()}
    about["load_after"] = os.getloadavg()[0]
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "compile.json"
    path.write_text(json.dumps(to_plain({**about, "models": found}), indent=1) + "\n")
    console = Console(width=None if sys.stdout.isatty() else 180)
    show(found, about, console)
    console.print(str(path), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
