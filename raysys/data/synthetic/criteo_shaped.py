"""A log in the shape of Criteo's, on which other libraries were measured: 13 dense and 26 categorical columns."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raysys.data.synthetic.spec import TRUTH
from raysys.data.synthetic.write import Job, Shard, plan_shards, write_log
from raysys.data.synthetic.zipf import power_law_ids
from raysys.schema import DenseFeature, FeatureSchema, Label, SparseFeature, Table

SEED = 7
NUM_DENSE = 13
CARDINALITIES = (
    *(1460, 583, 100_000, 50_000, 305, 24, 12_517, 633, 3, 93_145, 5683, 100_000, 3194),
    *(27, 14_992, 100_000, 10, 5652, 2173, 4, 100_000, 18, 15, 80_000, 105, 40_000),
)
PAIRS = ((0, 5), (1, 9), (4, 13), (5, 16), (6, 10), (7, 12), (8, 22), (13, 17), (16, 19), (18, 24), (21, 22), (10, 25))

Floats = NDArray[np.float64]


def prepare_criteo_shaped(
    folder: str | Path, rows: int = 600_000, embedding_dim: int = 16, processes: int | None = None
) -> None:
    """Write the log: i0..i12, c0..c25 (encoding index), label and its true probability, whose AUC is 0.822.

    One random stream (seed 7) makes all rows, column after column, so `rows` fixes every row; it is cut into shards by
    moving the stream, and the rows are the same for any number of writer `processes` (None = one per core).
    """
    write_log(
        folder,
        criteo_shaped_schema(embedding_dim),
        {"generator": "criteo_shaped 1", "rows": rows, "embedding_dim": embedding_dim},
        lambda: _plan(rows),
        processes,
    )


def criteo_shaped_schema(embedding_dim: int = 16) -> FeatureSchema:
    """13 dense features as they are (they are logarithms already), 26 tables, one label."""
    return FeatureSchema(
        tables=tuple(Table(f"c{n}", cardinality, embedding_dim) for n, cardinality in enumerate(CARDINALITIES)),
        dense=tuple(DenseFeature(f"i{n}") for n in range(NUM_DENSE)),
        sparse=tuple(SparseFeature(f"c{n}", f"c{n}", encoding="index") for n in range(len(CARDINALITIES))),
        labels=(Label("label"),),
    )


@functools.lru_cache(maxsize=1)
def _planted() -> tuple[Floats, list[Floats], list[Floats], dict[str, Any]]:
    """Dense weights [13], effects [c] and factors [c, 4] by field, and where the stream stands after them."""
    rng = np.random.default_rng(SEED)
    weights = rng.normal(0, 0.15, NUM_DENSE)
    effects = [rng.normal(0, 0.28, cardinality) for cardinality in CARDINALITIES]
    factors = [rng.normal(0, 0.35, (cardinality, 4)) for cardinality in CARDINALITIES]
    return weights, effects, factors, dict(rng.bit_generator.state)


def _plan(rows: int) -> list[Job]:
    """The shards, each with where the stream stands at its dense columns and after all dense columns."""
    shards = plan_shards(rows)
    rng = _at(_planted()[3])
    starts = []
    for shard in shards:
        starts.append(dict(rng.bit_generator.state))
        # How much of the stream an exponential takes differs from one to the next: it has to be drawn to know.
        rng.exponential(1.0, (shard.rows, NUM_DENSE))
    end = dict(rng.bit_generator.state)
    return [
        (shard, functools.partial(_make_rows, shard, rows, start, end))
        for shard, start in zip(shards, starts, strict=True)
    ]


def _at(state: dict[str, Any], skip: int = 0) -> np.random.Generator:
    generator = np.random.PCG64()
    generator.state = state  # type: ignore[assignment]
    return np.random.Generator(generator.advance(skip) if skip else generator)


def _make_rows(shard: Shard, total: int, start: dict[str, Any], end: dict[str, Any]) -> pa.Table:
    weights, effects, factors, _ = _planted()
    exponentials = _at(start).exponential(1.0, (shard.rows, NUM_DENSE)).astype(np.float32)
    dense = np.log1p(exponentials * 3)  # [N, 13] float32
    logit = -1.6 + sum(weights[n] * (dense[:, n] - np.float32(1.1)) for n in range(NUM_DENSE))  # [N]
    ids = []
    for field, cardinality in enumerate(CARDINALITIES):
        uniform = _at(end, field * total + shard.start).random(shard.rows)
        ids.append(power_law_ids(uniform, cardinality, 1.1).astype(np.int32))
        logit += effects[field][ids[field]]
    for a, b in PAIRS:
        logit += (factors[a][ids[a]] * factors[b][ids[b]]).sum(1)
    truth = 1 / (1 + np.exp(-logit))
    label = _at(end, len(CARDINALITIES) * total + shard.start).random(shard.rows) < truth
    columns: dict[str, Any] = {f"i{n}": dense[:, n] for n in range(NUM_DENSE)}
    columns |= {f"c{field}": values for field, values in enumerate(ids)}
    return pa.table(columns | {"label": label.astype(np.int8), "label" + TRUTH: truth})
