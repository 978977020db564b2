"""IVF-PQ: inverted lists of quantised vectors (Jégou, Douze and Schmid, TPAMI 2011), by faiss, then a second look."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
from typing_extensions import Self

from raysys.errors import UserError
from raysys.models.retrieval.indexes.folder import read_array, read_file, read_settings, write_index
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
from raysys.models.retrieval.indexes.threads import faiss_threads

CENTROIDS = 256
"""Of each product quantiser, whose codes take a byte; as many vectors are the least that it learns from."""
QUERIES = 64
"""Queries of which the candidates are looked at again at once: 64 times 200 vectors of width 64 take 3 MiB."""


class IVFPQ:
    """An `Index` that compares a query with the items of the nearest lists alone.

    Each item stands in the list of its nearest centroid as D/2 bytes, a code for each pair of columns of what the centroid
    leaves over. A search takes the codes of `nprobe` lists, keeps the best `rerank`·k items and takes their inner
    products again with the vectors in half precision, which is what it returns: off by at most |q|·|v|/2048 or so.

    The first call of `add` learns about 4·√n centroids and the codes from its n vectors, at least 256 of the kind that
    will follow. Build the index anew when the catalogue has grown several-fold or the vectors come from another model.
    """

    def __init__(self, dim: int, *, nprobe: int = 32, rerank: int = 2, threads: int = 1) -> None:
        if dim % 2:
            raise UserError(f"IVF-PQ codes pairs of columns, and vectors have {dim}", "an even width is expected")
        self.dim, self.nprobe, self.rerank, self.threads = dim, nprobe, rerank, threads
        self._lists: faiss.IndexIVFPQ | None = None  # until it has learnt; its ids are slots
        self._ids = np.zeros(0, np.int64)  # by slot, NO_ITEM where it is free
        self._vectors = np.zeros((0, dim), np.float16)
        self._slots = IdMap(self._ids, self._ids)

    def __len__(self) -> int:
        return len(self._slots)

    def add(self, ids: Ids, vectors: Vectors) -> None:
        """See `Index.add`. Raises UserError also where the first call brings too few vectors."""
        ids, vectors = check_items(ids, vectors, self.dim)
        if not len(ids):
            return
        slots = self._slots.find(ids)
        new = slots < 0
        with faiss_threads(self.threads):
            if self._lists is None:
                self._lists = _learn(vectors)
            self._lists.remove_ids(faiss.IDSelectorBatch(slots[~new]))
            slots[new] = self._take_slots(int(new.sum()))
            self._lists.add_with_ids(vectors, slots)
        self._ids[slots], self._vectors[slots] = ids, vectors
        self._slots.insert(ids[new], slots[new])

    def remove(self, ids: Ids) -> None:
        """See `Index.remove`."""
        ids = check_ids(ids)
        slots = self._slots.find(ids)
        check_known(ids, slots >= 0)
        if self._lists is not None:
            self._lists.remove_ids(faiss.IDSelectorBatch(slots))
        self._ids[slots] = NO_ITEM
        self._slots.delete(ids)

    def search(self, queries: Vectors, k: int) -> tuple[Ids, Vectors]:
        """See `Index.search`."""
        queries = check_search(queries, self.dim, k)
        ids = np.full((len(queries), k), NO_ITEM, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        if self._lists is None:
            return ids, scores
        self._lists.nprobe = self.nprobe
        for start in range(0, len(queries), QUERIES):
            rows = slice(start, start + QUERIES)
            with faiss_threads(self.threads):
                _, slots = self._lists.search(queries[rows], k * self.rerank)  # [Q, C], -1 where fewer are found
            scores[rows], slots = self._best(queries[rows], slots, k)
            ids[rows] = np.where(slots >= 0, self._ids[slots], NO_ITEM)
        return ids, scores

    def save(self, folder: Path) -> None:
        """See `Index.save`: lists.faiss (centroids and codes; none before the first item), ids.npy and vectors.npy."""

        def write(partial: Path) -> None:
            if self._lists is not None:
                faiss.write_index(self._lists, str(partial / "lists.faiss"))
            np.save(partial / "ids.npy", self._ids)
            np.save(partial / "vectors.npy", self._vectors)

        settings = {"dim": self.dim, "nprobe": self.nprobe, "rerank": self.rerank}
        write_index(folder, IVFPQ, settings, write)

    @classmethod
    def load(cls, folder: Path, threads: int = 1) -> Self:
        """See `Index.load`."""
        index = cls(**read_settings(folder, IVFPQ), threads=threads)
        if (folder / "lists.faiss").exists():
            index._lists = read_file(folder / "lists.faiss", faiss.read_index)
        index._ids, index._vectors = read_array(folder / "ids.npy"), read_array(folder / "vectors.npy")
        slots = np.flatnonzero(index._ids != NO_ITEM)
        index._slots = IdMap(index._ids[slots], slots)
        return index

    def _take_slots(self, count: int) -> Ids:
        """Slots for new items: free ones first, then further ones, for which room is doubled where it is short."""
        free = np.flatnonzero(self._ids == NO_ITEM)[:count]
        if len(free) == count:
            return free
        size = len(self._ids)
        room = max(size + count - len(free), min(2 * size, size + 2**20))
        self._ids = np.concatenate([self._ids, np.full(room - size, NO_ITEM)])
        self._vectors = np.concatenate([self._vectors, np.zeros((room - size, self.dim), np.float16)])
        return np.concatenate([free, np.arange(size, size + count - len(free))])

    def _best(self, queries: Vectors, slots: Ids, k: int) -> tuple[Vectors, Ids]:
        """The k best [Q, k] of candidates [Q, C]: inner products, largest first, and slots."""
        vectors = self._vectors.take(slots, axis=0, mode="clip").astype(np.float32)  # [Q, C, D]
        scores = np.einsum("qcd,qd->qc", vectors, queries)
        scores[slots < 0] = -np.inf
        order = np.argsort(-scores, axis=1)[:, :k]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(slots, order, 1)


def _learn(vectors: Vectors) -> faiss.IndexIVFPQ:
    """Empty inverted lists with centroids and codes learnt from vectors [n, D]."""
    count, dim = vectors.shape
    if count < CENTROIDS:
        raise UserError(
            f"IVF-PQ learns from the vectors of the first call of add, which brought {count}",
            f"at least {CENTROIDS} are expected; at such sizes exact search is as fast",
        )
    lists = max(1, min(round(4 * count**0.5), count // 39))  # faiss asks for 39 vectors a centroid
    index = faiss.IndexIVFPQ(faiss.IndexFlatIP(dim), dim, lists, dim // 2, 8, faiss.METRIC_INNER_PRODUCT)
    index.cp.max_points_per_centroid = 64  # 256 of faiss take 3.5 times as long at a million, for the same recall
    index.pq.cp.min_points_per_centroid = 1  # a warning of faiss, nothing else
    index.train(vectors)
    return index
