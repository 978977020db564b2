"""Slices of an evaluation: which rows have which value of a column."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysys.errors import UserError, nearest
from raysys.schema import FeatureSchema

if TYPE_CHECKING:
    from raysys.data.batch import Batch

TaskMetrics = dict[str, dict[str, float]]
"""{task: {metric: value}}"""

MAX_SLICES = 100
"""Values of a column that are reported, those with the most rows; all others are one slice, OTHER."""

NO_ID, OTHER = -(1 << 63), -(1 << 63) + 1
"""In place of a value: rows that have none, and values beyond the MAX_SLICES most frequent."""


def named_slices(
    slices: Mapping[str, Mapping[int, TaskMetrics]],
    schema: FeatureSchema,
    vocabulary: Callable[[str], pa.Array | None],
) -> dict[str, dict[str, TaskMetrics]]:
    """The slices of `Evaluator.compute` under the raw values of their ids; `vocabulary` is that of the transforms.

    Hashed and index ids and extra columns stay numbers.
    """
    tables = {feature.name: feature.table for feature in schema.sparse}
    named = {}
    for column, parts in slices.items():
        words = vocabulary(tables[column]) if column in tables else None
        named[column] = {_slice_name(value, words): metrics for value, metrics in parts.items()}
    return named


def _slice_name(value: int, words: pa.Array | None) -> str:
    if value == NO_ID:
        return "(none)"
    if value == OTHER:
        return "(other)"
    if words is None:
        return str(value)
    return str(words[value - 1].as_py()) if value > 0 else "(out of vocabulary)"


def check_slices(schema: FeatureSchema, slices: Sequence[str]) -> None:
    """Raise a UserError for a column that rows cannot be sliced by."""
    known = [feature.name for feature in schema.unweighted if feature.max_length == 1]
    known += [column.name for column in schema.extra if column.kind == "int"]
    for name in slices:
        if name not in known:
            raise UserError(
                f"train.slices: {name!r} is neither a sparse feature with max_length 1 nor an extra column of kind int",
                nearest(name, known),
            )


def slice_ids(batch: Batch, name: str) -> Tensor:
    """The id of each row in a slice column [B] int64; NO_ID where the row has none."""
    if name in batch.extra:
        column = batch.extra[name]
        assert isinstance(column, Tensor)
        return column.long()
    bag = batch.sparse[name]
    lengths = bag.lengths()
    ids = torch.full_like(lengths, NO_ID, dtype=torch.int64)
    ids[lengths > 0] = bag.values().long()
    return ids


def slice_rows(values: NDArray[np.int64]) -> list[tuple[int, NDArray[np.int64]]]:
    """(value, its rows) of the most frequent values, most rows first, then OTHER with the rest of the rows."""
    found, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    rows = np.split(np.argsort(inverse, kind="stable"), np.cumsum(counts)[:-1]) if len(found) else []
    by_size = np.argsort(-counts, kind="stable")
    parts = [(int(found[i]), rows[i]) for i in by_size[:MAX_SLICES]]
    if len(by_size) > MAX_SLICES:
        parts.append((OTHER, np.concatenate([rows[i] for i in by_size[MAX_SLICES:]])))
    return parts
