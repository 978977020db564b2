"""The item table of a release: the catalogue's rows by key, with all its columns, also those that no model reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raysys.data.columns import integers, whole
from raysys.errors import UserError, first_line


class ItemTable:
    """Rows by the integer in the column `key`, held in memory.

    keys: [N] int64, in the order of the file.
    """

    def __init__(self, rows: pa.Table, key: str) -> None:
        self.rows, self.key = rows.combine_chunks(), key
        self.keys = integers(whole(rows[key]))
        self._order = np.argsort(self.keys, kind="stable")
        self._sorted = self.keys[self._order]

    @classmethod
    def load(cls, path: Path, key: str) -> ItemTable:
        """Read a Parquet file; a UserError names it where it cannot be read or lacks the key."""
        try:
            rows = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: cannot be read as parquet: {first_line(error)}") from None
        if key not in rows.column_names or not len(rows):
            raise UserError(f"{path}: no rows with a column {key!r}", "a row per item is expected")
        return cls(rows, key)

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row of each key, -1 where the table has none."""
        place = np.searchsorted(self._sorted, keys).clip(max=len(self) - 1)
        return np.where(self._sorted[place] == keys, self._order[place], -1)

    def take(self, keys: NDArray[np.int64]) -> pa.Table:
        """Rows [n] of keys [n], in their order. A key that the table lacks has its row, too: null but for the key."""
        place = self.find(keys)
        rows = self.rows.take(pa.array(place, mask=place < 0))
        column = rows.column_names.index(self.key)
        return rows.set_column(column, self.key, pa.array(keys).cast(rows.schema.field(column).type))
