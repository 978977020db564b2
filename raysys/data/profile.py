"""What the columns of a raw table hold, from a bounded sample of its rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from numpy.typing import NDArray

from raysys.data.columns import Kind, flatten, kind_of, numbers, whole
from raysys.data.source import open_source, read_batches
from raysys.errors import UserError

SAMPLE_ROWS = 200_000


@dataclass(frozen=True)
class ColumnProfile:
    """One column. `distinct`, `low` to `high`, `median` and `text_length` speak of the elements where it holds lists.

    distinct: an estimate for the whole table where only some of its rows were looked at. low, high, median: of numbers.
    lengths: shortest and longest list. text_length: mean number of characters.
    """

    name: str
    kind: Kind
    is_list: bool
    null_share: float
    distinct: int
    low: float = math.nan
    high: float = math.nan
    median: float = math.nan
    lengths: tuple[int, int] = (1, 1)
    text_length: float = 0.0


@dataclass(frozen=True)
class TableProfile:
    """A table's columns by name. `rows` looked at, of `total_rows` (None: unknown, as counting a CSV means reading it)."""

    source: str
    columns: dict[str, ColumnProfile]
    rows: int
    total_rows: int | None
    sample: pa.Table

    @property
    def is_exact(self) -> bool:
        """Whether every row was looked at."""
        return self.rows == self.total_rows


def profile(path: str | Path, max_rows: int = SAMPLE_ROWS) -> TableProfile:
    """Look at `max_rows` rows: whole row groups spread evenly over a Parquet source, the first rows of a CSV."""
    data = open_source(path)
    sample, total_rows = _sample(data, str(path), max_rows)
    if len(sample) == 0:
        raise UserError(f"{path}: no rows", "a table with at least one row is expected")
    columns = {name: _profile_column(name, whole(sample[name]), total_rows) for name in sample.column_names}
    return TableProfile(str(path), columns, len(sample), total_rows, sample)


def _sample(data: pads.Dataset, name: str, max_rows: int) -> tuple[pa.Table, int | None]:
    if not isinstance(data.format, pads.ParquetFileFormat):
        batches, rows = [], 0
        for batch in read_batches(data, name):
            batches.append(batch.slice(0, max_rows - rows))
            rows += len(batch)
            if rows > max_rows:
                return pa.Table.from_batches(batches), None
        return pa.Table.from_batches(batches, data.schema), rows
    total_rows = data.count_rows()
    if total_rows > max_rows:
        groups = [group for fragment in data.get_fragments() for group in fragment.split_by_row_group()]
        wanted = max(1, round(len(groups) * max_rows / total_rows))
        chosen = [groups[i] for i in np.linspace(0, len(groups) - 1, wanted).round().astype(int)]
        data = pads.FileSystemDataset(chosen, data.schema, data.format, data.filesystem)
    batches, rows = [], 0
    for batch in read_batches(data, name):
        batches.append(batch.slice(0, max_rows - rows))
        rows += len(batch)
        if rows >= max_rows:
            break
    return pa.Table.from_batches(batches, data.schema), total_rows


def _profile_column(name: str, column: pa.Array, total_rows: int | None) -> ColumnProfile:
    kind, is_list = kind_of(column.type)
    null_share = column.null_count / len(column)
    lengths = (1, 1)
    if is_list:
        elements, counts = flatten(column)
        lengths = (int(counts.min()), int(counts.max()))
    else:
        elements = column
    scale = (total_rows or len(column)) / len(column)
    distinct = 0 if kind == "other" else estimate_distinct(elements, scale)
    low = high = median = math.nan
    if kind in ("integer", "unsigned", "bool", "number"):
        values = numbers(elements)
        values = values[np.isfinite(values)]
        if len(values):
            low, high, median = float(values.min()), float(values.max()), float(np.median(values))
    text_length = pc.mean(pc.utf8_length(elements)).as_py() if kind == "string" else 0.0
    return ColumnProfile(name, kind, is_list, null_share, distinct, low, high, median, lengths, text_length or 0.0)


def estimate_distinct(sample: pa.Array, scale: float) -> int:
    """How many distinct values a column has of which 1 / `scale` was seen; exact for 1.

    The estimator with a guaranteed error of Charikar and others (PODS 2000): values seen once count sqrt(scale) times.
    """
    counts: NDArray[np.int64] = pc.value_counts(sample.drop_null()).field("counts").to_numpy()
    once = np.count_nonzero(counts == 1)
    return round(len(counts) - once + once * math.sqrt(scale))
