"""Features by id: rows of items or users that a request asks for by their keys.

The embedded store is a folder of versions, each written once and mapped into memory by every process that reads it:

store/
  00000007/rows.arrow       the rows, one Arrow record batch, sorted by
  00000007/hashes.npy       the keys, or hashes of them where they are text
  00000007/store.json       the name of the key and the seed of the hashes
  00000007/manifest.json    sha256 of every file above
  lock                      held by the one process that writes
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raysys.data.columns import integers, is_list, is_text, text
from raysys.data.hashing import hash_strings
from raysys.errors import UserError
from raysys.hashed_folder import files_of, find_damage, hash_files, read_json, read_manifest, write_manifest
from raysys.schema import FeatureSchema
from raysys.serve.store_rows import as_rows, check_keys, missing_rows, with_keys

FORMAT_VERSION = 1
Keys: TypeAlias = Sequence[int] | Sequence[str] | NDArray[np.int64] | pa.Array
Found: TypeAlias = tuple[pa.RecordBatch, NDArray[np.bool_]]


class FeatureStore(Protocol):
    """Rows by key. A reader stays with its version until `refresh`."""

    @property
    def schema(self) -> pa.Schema:
        """The columns and their types."""

    @property
    def key(self) -> str:
        """The name of the key's column: 64-bit integers or text."""

    @property
    def version(self) -> int:
        """Of the rows that are read, larger for every later one."""

    def __len__(self) -> int: ...

    def get(self, keys: Keys) -> Found:
        """The rows [n] of keys [n], in their order, and which were found; the others have the key and nulls.

        Raises UserError for keys of another type.
        """

    def some_keys(self, count: int) -> list[Any]:
        """The keys of up to `count` rows, in no order."""

    def put(self, rows: pa.Table) -> None:
        """Add rows, or replace those of the same key as a whole. Raises UserError where columns or types differ."""

    def replace(self, rows: pa.Table) -> None:
        """Make these all the rows there are, at once for every reader that refreshes. The columns may be others."""

    def refresh(self) -> bool:
        """Go on to the newest version; whether there was a newer one."""


@dataclass(frozen=True)
class _Version:
    """One version, opened: arrays that lie in mapped files. hashes: [N] ascending, of the key of each row."""

    number: int
    key: str
    seed: int
    rows: pa.RecordBatch
    hashes: NDArray[np.int64] | NDArray[np.uint64]


class ArrowStore:
    """The embedded `FeatureStore`: rows are copied out of a mapped Arrow file, which all readers of a machine share.

    A look-up is a binary search; its rows are Arrow's without being decoded, of whatever type. The price is in writing:
    `put` writes a new version of everything (0.7 s for a million rows), so collect what there is to put; for a stream of
    single updates take Redis. A version that a reader has open stays readable for it after it is deleted; the
    newest two are kept. A crash leaves the version before, whatever it interrupts.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open the newest version. Raises UserError where there is none, or naming the file that is damaged."""
        self._folder = Path(folder)
        self._opened = _open(self._folder)

    @classmethod
    def create(cls, folder: str | Path, rows: pa.Table, key: str) -> ArrowStore:
        """Write rows, one for each key, as the newest version of a store, which need not exist yet.

        Raises UserError for a key that is missing, null, there twice, or neither an integer nor text.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with _writing(folder):
            _publish(folder, rows, key)
        return cls(folder)

    @property
    def schema(self) -> pa.Schema:
        """The columns and their types."""
        return self._opened.rows.schema

    @property
    def key(self) -> str:
        """The name of the key's column."""
        return self._opened.key

    @property
    def version(self) -> int:
        """The number of the version that is read."""
        return self._opened.number

    def __len__(self) -> int:
        return self._opened.rows.num_rows

    def get(self, keys: Keys) -> Found:
        """See `FeatureStore.get`."""
        opened = self._opened  # another thread may refresh meanwhile
        asked = check_keys(keys, opened.rows.schema, opened.key)
        place, found = _find(opened, asked)
        if not found.any():
            return with_keys(missing_rows(opened.rows.schema, len(asked)), opened.key, asked), found
        rows = opened.rows.take(pa.array(place, mask=None if found.all() else ~found))
        return (rows if found.all() else with_keys(rows, opened.key, asked)), found

    def some_keys(self, count: int) -> list[Any]:
        """See `FeatureStore.some_keys`."""
        opened = self._opened
        return opened.rows.column(opened.key)[:count].to_pylist()

    def put(self, rows: pa.Table) -> None:
        """See `FeatureStore.put`."""
        with _writing(self._folder):
            newest = _open(self._folder)
            added = as_rows(rows, newest.key, newest.rows.schema)
            place, found = _find(newest, added[newest.key])
            kept = np.ones(newest.rows.num_rows, bool)
            kept[place[found]] = False
            tables = [pa.Table.from_batches([newest.rows.filter(pa.array(kept))]), pa.Table.from_batches([added])]
            _publish(self._folder, pa.concat_tables(tables), newest.key)
        self.refresh()

    def replace(self, rows: pa.Table) -> None:
        """See `FeatureStore.replace`."""
        with _writing(self._folder):
            _publish(self._folder, rows, self.key)
        self.refresh()

    def refresh(self) -> bool:
        """See `FeatureStore.refresh`; a listing of the folder where there is nothing newer."""
        if _versions(self._folder)[-1] == self.version:
            return False
        self._opened = _open(self._folder)
        return True


def fill_defaults(rows: pa.RecordBatch, schema: FeatureSchema) -> pa.RecordBatch:
    """Rows with the schema's defaults in the place of nulls: its number for a dense feature, no ids for a bag or sequence.

    A dense feature with a missing flag stays null, since the flag says more than a default, and so does a single id, which
    is looked up as an unknown one.
    """
    numbers = {feature.name: feature.default for feature in schema.dense if not feature.missing_flag}
    names = [feature.name for feature in schema.id_features]
    names += [feature.weights for feature in schema.sparse if feature.weights]
    arrays = dict(zip(rows.schema.names, rows.columns, strict=True))
    for name, array in arrays.items():
        if name in numbers:
            arrays[name] = pc.fill_null(array, pa.scalar(numbers[name]).cast(array.type, safe=False))
        elif name in names and is_list(array.type):
            arrays[name] = pc.if_else(array.is_valid(), array, pa.scalar([], array.type))
    return pa.RecordBatch.from_arrays(list(arrays.values()), schema=rows.schema)


def _find(opened: _Version, keys: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The row of each key, any where it was not found, and which were."""
    if not len(opened.hashes):
        return np.zeros(len(keys), np.int64), np.zeros(len(keys), bool)
    hashes = _hash(keys, opened.seed)
    place = np.searchsorted(opened.hashes, hashes).clip(max=len(opened.hashes) - 1)
    found = opened.hashes[place] == hashes
    if is_text(keys):  # an unknown text may have the hash of a known one
        same = pc.equal(opened.rows.column(opened.key).take(pa.array(place)), keys)
        found &= same.to_numpy(zero_copy_only=False)
    return place, found


def _hash(keys: pa.Array, seed: int) -> NDArray[np.int64] | NDArray[np.uint64]:
    """What rows are sorted by: integers as they are, a 64-bit hash of text."""
    return hash_strings(text(keys), seed) if is_text(keys) else integers(keys)


def _sort(keys: pa.Array) -> tuple[NDArray[np.int64], NDArray[Any], int]:
    """The order of the rows, the hashes of their keys in that order, and the first seed of which no two are equal."""
    for seed in itertools.count():
        hashes = _hash(keys, seed)
        order = np.argsort(hashes)
        hashes = hashes[order]
        if not (hashes[1:] == hashes[:-1]).any():
            break
    return order, hashes, seed


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Be the one process that writes; wait for another one's end. The system frees the lock of a process that dies."""
    with open(folder / "lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _publish(folder: Path, rows: pa.Table, key: str) -> None:
    """Write the next version beside the others, move it among them when it is on the disk, and delete old ones."""
    batch = as_rows(rows, key)
    order, hashes, seed = _sort(batch[key])
    number = max(_versions(folder), default=0) + 1
    for left in folder.glob("*.partial"):  # of a process that died
        shutil.rmtree(left)
    partial = folder / f"{number:08d}.partial"
    partial.mkdir()
    batch = batch.take(pa.array(order))
    with pa.OSFile(str(partial / "rows.arrow"), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
    np.save(partial / "hashes.npy", hashes)
    (partial / "store.json").write_text(json.dumps({"key": key, "seed": seed}) + "\n")
    for path in partial.iterdir():
        _sync(path)
    write_manifest(partial, FORMAT_VERSION, hash_files(partial, files_of(partial)))
    partial.rename(folder / f"{number:08d}")
    _sync(folder)
    for old in _versions(folder)[:-2]:
        going = (folder / f"{old:08d}").rename(folder / f"{old:08d}.partial")  # no longer there, for readers, at once
        shutil.rmtree(going)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _versions(folder: Path) -> list[int]:
    """The numbers of all whole versions, ascending."""
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(int(name) for name in names if re.fullmatch(r"\d{8}", name))


def _open(folder: Path) -> _Version:
    """The newest version; the one after it where that is deleted meanwhile."""
    while numbers := _versions(folder):
        try:
            return _open_version(folder / f"{numbers[-1]:08d}")
        except (UserError, OSError):
            if numbers[-1] in _versions(folder):
                raise
    raise UserError(f"{folder}: no feature store is there", "make one: ArrowStore.create(folder, rows, key)")


def _open_version(version: Path) -> _Version:
    hashes = read_manifest(version, FORMAT_VERSION)
    for name, damage in find_damage(version, hashes, hashes).items():
        raise UserError(f"{version / name} {damage}", "build the store again, or delete this version to read the last")
    about = read_json(version / "store.json")
    rows = pa.ipc.open_file(pa.memory_map(str(version / "rows.arrow"))).get_batch(0)
    keys = np.load(version / "hashes.npy", mmap_mode="r", allow_pickle=False)
    return _Version(int(version.name), about["key"], about["seed"], rows, np.asarray(keys))
