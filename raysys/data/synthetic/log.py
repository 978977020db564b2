"""Synthetic click logs at any scale, each shard of rows from its own random stream."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raysys.data.synthetic.planted import SPAN, START, true_probabilities
from raysys.data.synthetic.spec import TRUTH, SyntheticSpec
from raysys.data.synthetic.write import Shard, plan_shards, write_log
from raysys.data.synthetic.zipf import power_law_ids


def prepare(
    folder: str | Path, rows: int = 600_000, spec: SyntheticSpec | None = None, processes: int | None = None
) -> None:
    """Write a log of `rows` rows, in the order of time: the first 5/6 train, then valid, then test.

    The rows are the same for any number of writer `processes` (None = one per core). Does nothing where the folder
    already holds the same log.
    """
    spec = spec or SyntheticSpec()
    arguments = {"generator": "planted 1", "rows": rows} | dataclasses.asdict(spec)
    if not spec.entire_space:
        del arguments["entire_space"]  # as in folders that were written before there was such a label
    write_log(
        folder,
        spec.schema(),
        arguments,
        lambda: [(shard, functools.partial(make_rows, spec, shard, rows)) for shard in plan_shards(rows)],
        processes,
    )


def make_rows(spec: SyntheticSpec, shard: Shard, total: int) -> pa.Table:
    """One shard of a log of `total` rows: a function of (spec, shard, total) alone."""
    rng = np.random.default_rng(np.random.SeedSequence(spec.seed, spawn_key=(1, shard.number)))
    number = np.arange(shard.start, shard.stop)
    columns = {"example_id": pa.array(number), "time": pa.array(START + number * SPAN // total)}
    for name, cardinality in spec.fields.items():
        ids = _ids(rng, shard.rows, cardinality, spec.exponent)
        columns[name] = _with_nulls(rng, ids, spec.missing_share(name))
    for column in range(spec.num_dense):
        values = rng.standard_normal(shard.rows, np.float32)
        columns[f"d{column}"] = _with_nulls(rng, values, spec.missing_share(f"d{column}"))
    if spec.history_length:
        lengths = rng.integers(0, spec.history_length + 1, shard.rows)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        events = _ids(rng, int(offsets[-1]), spec.num_items, spec.exponent)
        columns["history"] = pa.ListArray.from_arrays(offsets, events)
    truth = true_probabilities(spec, pa.table(columns))  # [T, N]
    return pa.table(columns | _labels(rng, spec, truth))


def _labels(rng: np.random.Generator, spec: SyntheticSpec, truth: NDArray[np.float64]) -> dict[str, pa.Array]:
    drawn = dict(zip(spec.tasks, rng.random(truth.shape) < truth, strict=True))
    observed = {task: np.ones(truth.shape[1], bool) for task in spec.tasks}
    for task in spec.tasks:  # in order, so that the second step of a funnel is settled before the third
        for first in [first for first, then in spec.funnel if then == task]:
            observed[task] &= observed[first] & drawn[first]
    labels = {task: pa.array(drawn[task].astype(np.int8), mask=~observed[task]) for task in spec.tasks}
    true = dict(zip(spec.tasks, truth, strict=True))
    for name, path in spec.funnel_paths.items():
        labels[name] = pa.array(np.logical_and.reduce([drawn[task] for task in path]).astype(np.int8))
        true[name] = np.multiply.reduce([true[task] for task in path])
    return labels | {task + TRUTH: pa.array(values) for task, values in true.items()}


def _ids(rng: np.random.Generator, rows: int, cardinality: int, exponent: float) -> NDArray[np.int32]:
    return power_law_ids(rng.random(rows), cardinality + 1.0, exponent).astype(np.int32)


def _with_nulls(rng: np.random.Generator, values: NDArray[np.generic], share: float) -> pa.Array:
    return pa.array(values, mask=rng.random(len(values)) < share if share else None)
