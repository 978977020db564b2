"""Writes a data set in parallel and in one piece: the folder appears when everything in it is complete."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raysys.data.prepare.dataset import SPLITS, prepare_folder
from raysys.data.synthetic.bayes import bayes_metrics
from raysys.errors import UserError
from raysys.schema import FeatureSchema

SHARD_ROWS = 65_536
"""Rows of a shard: one random stream, one file, one row group."""


@dataclass(frozen=True)
class Shard:
    """Rows [start, stop) of the whole log; shards are numbered over all splits."""

    number: int
    start: int
    stop: int
    split: str

    @property
    def rows(self) -> int:
        """Rows of this shard, at most `SHARD_ROWS`."""
        return self.stop - self.start


Job = tuple[Shard, Callable[[], pa.Table]]


def plan_shards(rows: int) -> list[Shard]:
    """The shards of a log of which the first 5/6 are for training and the rest, in halves, for validation and test."""
    train = int(rows * 0.8333333)
    valid = (rows - train) // 2
    if min(train, valid) < 1:
        raise UserError(f"synthetic: rows is {rows}", "at least 12 rows are needed, so that each split has one")
    shards: list[Shard] = []
    for split, start, stop in (("train", 0, train), ("valid", train, train + valid), ("test", train + valid, rows)):
        for first in range(start, stop, SHARD_ROWS):
            shards.append(Shard(len(shards), first, min(first + SHARD_ROWS, stop), split))
    return shards


def write_log(
    folder: str | Path,
    schema: FeatureSchema,
    arguments: dict[str, Any],
    plan: Callable[[], list[Job]],
    processes: int | None,
) -> None:
    """Write train/, valid/, test/, schema.yaml and prepared.json (arguments, rows, Bayes metrics), unless they are there.

    plan: gives the shards, each with the (picklable) function that makes its rows. processes: how many write at the
    same time, None = one per core. A folder with anything else in it is a `UserError`, never overwritten.
    """

    def write(partial: Path) -> dict[str, Any]:
        jobs = plan()
        for split in SPLITS:
            (partial / split).mkdir()
        _write_shards(partial, jobs, processes)
        schema.save(partial / "schema.yaml")
        return {"bayes": {split: bayes_metrics(partial / split, schema.tasks) for split in SPLITS}}

    prepare_folder(folder, arguments, write)


def _write_shards(folder: Path, jobs: list[Job], processes: int | None) -> None:
    processes = min(processes or os.cpu_count() or 1, len(jobs))
    if processes == 1:
        for shard, make_rows in jobs:
            _write_shard(folder, shard, make_rows)
        return
    # Spawned, not forked: the caller may have threads (Arrow, torch), which a fork does not carry over.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(_write_shard, folder, *job) for job in jobs]:
            done.result()


def _write_shard(folder: Path, shard: Shard, make_rows: Callable[[], pa.Table]) -> None:
    table = make_rows()
    assert table.num_rows == shard.rows
    # Dictionaries pay for repeated ids only; trying one on floats costs time and saves nothing.
    ids = [field.name for field in table.schema if pa.types.is_int32(field.type)]
    path = folder / shard.split / f"part-{shard.number:06d}.parquet"
    pq.write_table(table, path, row_group_size=SHARD_ROWS, use_dictionary=ids, compression="zstd")
