"""Parquet files in row groups of one size."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUP_ROWS = 16_384


class RowGroupWriter:
    """One Parquet file whose row groups have `ROW_GROUP_ROWS` rows, whatever sizes arrive."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: list[pa.RecordBatch] = []
        self.file: pq.ParquetWriter | None = None

    def __enter__(self) -> RowGroupWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self.waiting:
            self._write_groups(all_rows=True)
        if self.file is not None:
            self.file.close()

    def write(self, batch: pa.RecordBatch) -> None:
        """Take rows; those that fill no row group yet wait for more."""
        self.waiting.append(batch)
        if sum(len(waiting) for waiting in self.waiting) >= ROW_GROUP_ROWS:
            self._write_groups(all_rows=False)

    def _write_groups(self, all_rows: bool) -> None:
        table = pa.Table.from_batches(self.waiting)
        if self.file is None:
            self.file = pq.ParquetWriter(self.path, table.schema, compression="zstd")
        full = len(table) if all_rows else len(table) // ROW_GROUP_ROWS * ROW_GROUP_ROWS
        self.file.write_table(table.slice(0, full), ROW_GROUP_ROWS)
        self.waiting = table.slice(full).to_batches()
