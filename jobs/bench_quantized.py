"""Measure what quantised tables take and how long a look-up is: a table, and OUT/quantized.json.

26 single ids, or 26 bags of 20 ids, over 26 tables of 20,000 rows and width 16, in fp32 (TorchRec), as `raysys.models.quantized_tables`
has them, and as `torchrec.quant` has them, whose rows are padded to 16 bytes. All forms answer in turns, so what else the machine does hits
all alike. There is one thread: on a quiet machine its CPU time is the wall clock's.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import bench_result
import torch
from bench_latency import take_turns
from bench_rival import THREADS
from rich.console import Console
from rich.table import Table
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, QuantConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.quant.embedding_modules import EmbeddingBagCollection as TorchRecQuantized
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from raysys.models.quantized_tables import FORMATS, quantize_tables
from raysys.strict_json import to_plain

FEATURES, WIDTH = 26, 16
FP32 = "fp32"
LENGTHS = (1, 20)


def collection(rows: int) -> EmbeddingBagCollection:
    """A table of `rows` rows for each feature."""
    torch.manual_seed(0)
    names = [f"c{number}" for number in range(FEATURES)]
    return EmbeddingBagCollection(
        [
            EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=WIDTH, feature_names=[name])
            for name in names
        ]
    )


def ours(bags: EmbeddingBagCollection, kind: str) -> nn.Module:
    """A quantised copy."""
    model = nn.ModuleDict({"bags": copy.deepcopy(bags)})
    quantize_tables(model, kind)
    return model["bags"]


def torchrecs(bags: EmbeddingBagCollection) -> nn.Module:
    """TorchRec's quantised copy, int8."""
    own: Any = copy.deepcopy(bags)
    activation = torch.quantization.PlaceholderObserver.with_args(dtype=torch.float)
    own.qconfig = QuantConfig(activation, torch.quantization.PlaceholderObserver.with_args(dtype=torch.qint8))
    return TorchRecQuantized.from_float(own)


def batch_of(bags: EmbeddingBagCollection, rows: int, length: int) -> KeyedJaggedTensor:
    """`length` random ids of each feature in each row."""
    configs = bags.embedding_bag_configs()
    values = torch.randint(configs[0].num_embeddings, (FEATURES * rows * length,))
    lengths = torch.full((FEATURES * rows,), length, dtype=torch.int32)
    return KeyedJaggedTensor([config.name for config in configs], values, lengths=lengths)


def measure(table_rows: int, rounds: dict[int, int]) -> list[dict[str, Any]]:
    """One row a form: bytes of all tables, and medians of a look-up by rows and ids of a bag."""
    bags = collection(table_rows)
    forms: dict[str, nn.Module] = {FP32: bags}
    forms |= {kind: ours(bags, kind) for kind in FORMATS} | {"torchrec.quant int8": torchrecs(bags)}
    found = [
        {"form": name, "bytes": sum(value.nbytes for value in form.state_dict().values())}
        for name, form in forms.items()
    ]
    for rows, turns_of_size in rounds.items():
        for length in LENGTHS:
            turns = take_turns(forms, batch_of(bags, rows, length), turns_of_size)
            for row in found:
                own, base = turns[str(row["form"])], turns[FP32]
                key = f"{rows}x{length}"
                row[f"wall_{key}"], row[f"cpu_{key}"] = (median(times) for times in zip(*own, strict=True))
                row[f"gain_{key}"] = median(b / a for (_, a), (_, b) in zip(own, base, strict=True))
    return found


def show(found: list[dict[str, Any]], about: dict[str, Any], console: Console) -> None:
    """The table."""
    console.print(
        f"{about['processor']}, {about['cpus']} cores, {about['threads_per_process']} thread, load {about['load_before']:.1f} "
        f"before and {about['load_after']:.1f} after; medians in milliseconds of CPU time, and how many times faster than fp32"
    )
    table = Table(box=None, header_style="bold")
    keys = [key.removeprefix("cpu_") for key in found[0] if key.startswith("cpu_")]
    for title in ("form", "bytes", "share", *(f"{key} ids" for key in keys)):
        table.add_column(title, no_wrap=True, justify="left" if title == "form" else "right")
    for row in found:
        times = [f"{row[f'cpu_{key}']:.2f} | {row[f'gain_{key}']:.2f}" for key in keys]
        table.add_row(row["form"], f"{row['bytes']:,}", f"{row['bytes'] / found[0]['bytes']:.3f}", *times)
    console.print(table)


def main() -> None:
    """Measure, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of quantized.json")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only to see that it works")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(THREADS)
    rounds = {2: 3} if options.quick else {1: 301, 200: 201, 512: 101}
    about = bench_result.machine() | {"rounds": rounds}
    found = measure(50 if options.quick else 20_000, rounds)
    about["load_after"] = os.getloadavg()[0]
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "quantized.json"
    path.write_text(json.dumps(to_plain({**about, "rows": found}), indent=1) + "\n")
    console = Console(width=None if sys.stdout.isatty() else 180)
    show(found, about, console)
    console.print(str(path), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
