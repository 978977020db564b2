"""Exhaustive search: one matrix product, then the k largest of each row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from raysys.models.retrieval.indexes.folder import read_array, read_settings, write_index
from raysys.models.retrieval.indexes.index import (
    NO_ITEM,
    IdMap,
    Ids,
    Vectors,
    check_ids,
    check_items,
    check_known,
    check_search,
)
from raysys.models.retrieval.indexes.threads import torch_threads

QUERIES, ITEMS = 64, 2**16
"""A block of scores, of this many queries and items, takes 16 MiB, whatever the sizes of the index and of the request."""


class Exact:
    """An `Index` that finds the true best items. Vectors are kept without gaps: what is removed makes room for the last ones."""

    def __init__(self, dim: int, *, threads: int = 1) -> None:
        self.dim, self.threads = dim, threads
        self._ids, self._vectors = np.zeros(0, np.int64), np.zeros((0, dim), np.float32)  # with room to grow
        self._slots = IdMap(self._ids, self._ids)

    def __len__(self) -> int:
        return len(self._slots)

    def add(self, ids: Ids, vectors: Vectors) -> None:
        """See `Index.add`."""
        ids, vectors = check_items(ids, vectors, self.dim)
        slots, size = self._slots.find(ids), len(self)
        new = slots < 0
        slots[new] = np.arange(size, size + new.sum())
        self._reserve(size + int(new.sum()))
        self._ids[slots], self._vectors[slots] = ids, vectors
        self._slots.insert(ids[new], slots[new])

    def remove(self, ids: Ids) -> None:
        """See `Index.remove`."""
        ids = check_ids(ids)
        slots = self._slots.find(ids)
        check_known(ids, slots >= 0)
        size = len(self) - len(ids)
        holes = slots[slots < size]
        last = np.setdiff1d(np.arange(size, len(self)), slots)
        self._slots.delete(ids)
        self._slots.move(self._ids[last], holes)
        self._ids[holes], self._vectors[holes] = self._ids[last], self._vectors[last]

    def search(self, queries: Vectors, k: int) -> tuple[Ids, Vectors]:
        """See `Index.search`."""
        queries = check_search(queries, self.dim, k)
        ids = np.full((len(queries), k), NO_ITEM, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        found = min(k, len(self))
        if not found:
            return ids, scores
        items = torch.from_numpy(self._vectors[: len(self)])
        with torch_threads(self.threads), torch.inference_mode():
            for start in range(0, len(queries), QUERIES):
                rows = slice(start, start + QUERIES)
                values, slots = _best(torch.from_numpy(queries[rows]), items, found)
                ids[rows, :found], scores[rows, :found] = self._ids[slots.numpy()], values.numpy()
        return ids, scores

    def save(self, folder: Path) -> None:
        """See `Index.save`: ids.npy and vectors.npy."""

        def write(partial: Path) -> None:
            np.save(partial / "ids.npy", self._ids[: len(self)])
            np.save(partial / "vectors.npy", self._vectors[: len(self)])

        write_index(folder, Exact, {"dim": self.dim}, write)

    @classmethod
    def load(cls, folder: Path, threads: int = 1) -> Self:
        """See `Index.load`."""
        index = cls(**read_settings(folder, Exact), threads=threads)
        index.add(read_array(folder / "ids.npy"), read_array(folder / "vectors.npy"))
        return index

    def _reserve(self, size: int) -> None:
        """Room for `size` items; doubled where it is short, so that adding one by one copies each only a few times."""
        if size > len(self._ids):
            room = max(size, 2 * len(self._ids))
            ids, vectors = np.empty(room, np.int64), np.empty((room, self.dim), np.float32)
            ids[: len(self)], vectors[: len(self)] = self._ids[: len(self)], self._vectors[: len(self)]
            self._ids, self._vectors = ids, vectors


def _best(queries: Tensor, items: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest inner products [Q, k] of queries [Q, D] with items [N, D], largest first, and which items they are."""
    values, slots = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    for start in range(0, len(items), ITEMS):
        scores = queries @ items[start : start + ITEMS].T  # [Q, block]
        best = scores.topk(min(k, scores.shape[1]))
        values = torch.cat([values, best.values], 1)
        slots = torch.cat([slots, best.indices + start], 1)
        values, order = values.topk(min(k, values.shape[1]))
        slots = slots.gather(1, order)
    return values, slots
