"""What every index does, the checks of what it is given, and where an id stands."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from raysys.errors import UserError, check_count

Ids = NDArray[np.int64]
Vectors = NDArray[np.float32]

NO_ITEM = -1
"""The id of a place in a result for which there is no item; no item can have it."""


class Index(Protocol):
    """Items by id, searched by inner product. Any int64 but `NO_ITEM` is an id.

    threads: how many one call may use, set for each call, whatever its thread: 1 in a serving replica, more in a job that
    builds. Calls that change an index must not run beside others of the same index.
    """

    dim: int
    threads: int

    def add(self, ids: Ids, vectors: Vectors) -> None:
        """Add items, or replace those that are there. ids: [n], each once; vectors: [n, D], finite.

        Raises UserError, before anything is changed, for what is not so.
        """

    def remove(self, ids: Ids) -> None:
        """Remove items for good. Raises UserError, before anything is changed, where one is not there or named twice."""

    def search(self, queries: Vectors, k: int) -> tuple[Ids, Vectors]:
        """For queries [Q, D] the ids [Q, k] and inner products [Q, k] of the k best items, best first.

        Where fewer are found the row ends with `NO_ITEM` and -inf. Raises UserError for another width, values that
        are not finite, or k < 1.
        """

    def __len__(self) -> int: ...

    def save(self, folder: Path) -> None:
        """Write a folder that `load` reads; what stood there before is replaced."""

    @classmethod
    def load(cls, folder: Path, threads: int = 1) -> Self:
        """Read what `save` wrote. Raises UserError naming the file that is missing or damaged."""


class IdMap:
    """The slot of each id, looked up for whole arrays at once: sorted ids, found by binary search.

    A change copies 16 bytes an item, which for a million items takes milliseconds: a hash table in Python objects would
    need ten times the memory and a loop.
    """

    def __init__(self, ids: Ids, slots: Ids) -> None:
        order = np.argsort(ids, kind="stable")
        self._ids, self._slots = ids[order], slots[order]

    def __len__(self) -> int:
        return len(self._ids)

    def find(self, ids: Ids) -> Ids:
        """The slots [n] of ids [n]; -1 where an id is not there."""
        if not len(self):
            return np.full(len(ids), -1, np.int64)
        place = np.searchsorted(self._ids, ids).clip(max=len(self) - 1)
        return np.where(self._ids[place] == ids, self._slots[place], -1)

    def insert(self, ids: Ids, slots: Ids) -> None:
        """Put new ids in."""
        order = np.argsort(ids)
        place = np.searchsorted(self._ids, ids[order])
        self._ids = np.insert(self._ids, place, ids[order])
        self._slots = np.insert(self._slots, place, slots[order])

    def delete(self, ids: Ids) -> None:
        """Take known ids out."""
        place = np.searchsorted(self._ids, ids)
        self._ids, self._slots = np.delete(self._ids, place), np.delete(self._slots, place)

    def move(self, ids: Ids, slots: Ids) -> None:
        """Give known ids other slots."""
        self._slots[np.searchsorted(self._ids, ids)] = slots


def check_items(ids: Ids, vectors: Vectors, dim: int) -> tuple[Ids, Vectors]:
    """Items to be added as contiguous int64 [n] and float32 [n, D]."""
    ids = check_ids(ids)
    vectors = check_vectors("vectors", vectors, dim)
    if len(ids) != len(vectors):
        raise UserError(f"{len(ids)} ids and {len(vectors)} vectors", "one vector an id is expected")
    if (ids == NO_ITEM).any():
        raise UserError(f"item id {NO_ITEM} stands for no item", "give the item another id")
    return ids, vectors


def check_ids(ids: Ids) -> Ids:
    """Ids as contiguous int64 [n], each there once."""
    ids = np.asarray(ids)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer) or ids.dtype == np.uint64:
        raise UserError(f"ids are {ids.dtype} of shape {list(ids.shape)}", "int64 of shape [n] is expected")
    ids = np.ascontiguousarray(ids, np.int64)
    ordered = np.sort(ids)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        raise UserError(f"item id {twice[0]} is given twice", "name each item once a call")
    return ids


def check_vectors(name: str, vectors: Vectors, dim: int) -> Vectors:
    """Vectors as contiguous float32 [n, D], all finite."""
    vectors = np.ascontiguousarray(vectors, np.float32)
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise UserError(f"{name} have shape {list(vectors.shape)}", f"[n, {dim}] is expected")
    finite = np.isfinite(vectors).all(1)
    if not finite.all():
        raise UserError(f"{name}: row {int(finite.argmin())} holds NaN or infinity", "find out where it comes from")
    return vectors


def check_search(queries: Vectors, dim: int, k: int) -> Vectors:
    """Queries as contiguous float32 [Q, D]."""
    check_count("k", k)
    return check_vectors("queries", queries, dim)


def check_known(ids: Ids, known: NDArray[np.bool_]) -> None:
    """Raise the UserError of `Index.remove` for the first id that is not there."""
    if not known.all():
        raise UserError(f"item id {ids[known.argmin()]} is not in the index", "it was never added, or removed before")
