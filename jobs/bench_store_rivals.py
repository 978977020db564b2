"""Embedded databases that the feature store was chosen among, with rows as JSON lists. `pip install lmdb rocksdict`."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from numpy.typing import NDArray

from raysys.serve.store import Found
from raysys.serve.store_rows import as_rows, missing_rows, with_keys


class Database:
    """Rows of a table as blobs by a 64-bit key; a database says how blobs are written and read.

    writes: whether this process is the one that writes.
    """

    def __init__(self, folder: Path, schema: pa.Schema, key: str, writes: bool) -> None:
        folder.mkdir(exist_ok=True)
        self._schema, self._key = schema, key

    def put(self, rows: pa.Table) -> None:
        """Write rows in one transaction."""
        batch = as_rows(rows, self._key)
        blobs = (
            json.dumps(row).encode() for row in zip(*(column.to_pylist() for column in batch.columns), strict=True)
        )
        self.write(zip(batch[self._key].to_pylist(), blobs, strict=True))

    def get(self, keys: NDArray[Any]) -> Found:
        """As `FeatureStore.get`."""
        values = self.read(keys.tolist())
        found = pa.array([value is not None for value in values]).to_numpy(zero_copy_only=False)
        empty = [None] * len(self._schema)
        columns = zip(*(empty if value is None else json.loads(value) for value in values), strict=True)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, self._schema, strict=True)]
        rows = pa.RecordBatch.from_arrays(arrays, schema=self._schema) if keys.size else missing_rows(self._schema, 0)
        return with_keys(rows, self._key, pa.array(keys)), found

    def write(self, rows: Iterable[tuple[int, bytes]]) -> None:
        """Add or replace blobs."""
        raise NotImplementedError

    def read(self, keys: Sequence[int]) -> list[bytes | None]:
        """The blobs of keys, None where there is none."""
        raise NotImplementedError


class LMDB(Database):
    """Memory-mapped B+ tree, one transaction a call, synchronised with the disk."""

    def __init__(self, folder: Path, schema: pa.Schema, key: str, writes: bool) -> None:
        super().__init__(folder, schema, key, writes)
        import lmdb

        self._database = lmdb.open(str(folder), map_size=2**34, readahead=False)

    def write(self, rows: Iterable[tuple[int, bytes]]) -> None:
        """See `Database`."""
        with self._database.begin(write=True) as transaction:
            transaction.cursor().putmulti([(_bytes(key), blob) for key, blob in rows])

    def read(self, keys: Sequence[int]) -> list[bytes | None]:
        """See `Database`."""
        with self._database.begin() as transaction:
            return [transaction.get(_bytes(key)) for key in keys]


class SQLite(Database):
    """A table with an integer key, in WAL mode, mapped into memory."""

    def __init__(self, folder: Path, schema: pa.Schema, key: str, writes: bool) -> None:
        super().__init__(folder, schema, key, writes)
        self._database = sqlite3.connect(folder / "rows.sqlite")
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "mmap_size=17179869184"):
            self._database.execute(f"PRAGMA {pragma}")
        self._database.execute("CREATE TABLE IF NOT EXISTS rows (id INTEGER PRIMARY KEY, blob)")

    def write(self, rows: Iterable[tuple[int, bytes]]) -> None:
        """See `Database`."""
        with self._database:
            self._database.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?)", rows)

    def read(self, keys: Sequence[int]) -> list[bytes | None]:
        """See `Database`."""
        marks = ",".join("?" * len(keys))
        found = dict(self._database.execute(f"SELECT id, blob FROM rows WHERE id IN ({marks})", keys))
        return [found.get(key) for key in keys]


class RocksDB(Database):
    """A log-structured tree, by rocksdict; only one process at a time may write, others see what was there when they opened."""

    def __init__(self, folder: Path, schema: pa.Schema, key: str, writes: bool) -> None:
        super().__init__(folder, schema, key, writes)
        from rocksdict import AccessType, Options, Rdict

        options = Options(raw_mode=True)
        options.create_if_missing(True)
        access = AccessType.read_write() if writes else AccessType.read_only()
        self._database = Rdict(str(folder), options, access_type=access)

    def write(self, rows: Iterable[tuple[int, bytes]]) -> None:
        """See `Database`."""
        for key, blob in rows:
            self._database[_bytes(key)] = blob
        self._database.flush()

    def read(self, keys: Sequence[int]) -> list[bytes | None]:
        """See `Database`."""
        return list(self._database.get([_bytes(key) for key in keys]) or [])


def _bytes(key: int) -> bytes:
    return (key + 2**63).to_bytes(8, "big")
