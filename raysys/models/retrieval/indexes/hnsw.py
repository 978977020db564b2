"""HNSW: a walk through a graph of neighbours (Malkov and Yashunin, arXiv 1603.09320), by faiss."""

from __future__ import annotations

import math
from pathlib import Path

import faiss
import numpy as np
from typing_extensions import Self

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


class HNSW:
    """An `Index` of full vectors and their neighbours: few comparisons a query, and a slow build.

    m: neighbours of an item in a layer, twice as many in the lowest. ef_construction, ef_search: how many candidates the
    walk keeps while it adds and while it searches (at least k); more of them find more of the true best.

    The graph cannot lose a node: a removed or replaced item stays in it as a stepping stone that is never returned. The
    walk grows by as many candidates as there are such nodes among the items, so recall holds and speed falls; a new
    index of the same items restores it. Inner products of vectors of very different lengths make poor neighbourhoods:
    meant for unit vectors.
    """

    def __init__(
        self, dim: int, *, m: int = 16, ef_construction: int = 128, ef_search: int = 200, threads: int = 1
    ) -> None:
        self.dim, self.threads = dim, threads
        self.m, self.ef_construction, self.ef_search = m, ef_construction, ef_search
        self._graph = faiss.IndexHNSWFlat(dim, m, faiss.METRIC_INNER_PRODUCT)
        self._graph.hnsw.efConstruction = ef_construction
        self._ids = np.zeros(0, np.int64)  # by node of the graph, NO_ITEM where it was removed
        self._nodes = IdMap(self._ids, self._ids)

    def __len__(self) -> int:
        return len(self._nodes)

    def add(self, ids: Ids, vectors: Vectors) -> None:
        """See `Index.add`."""
        ids, vectors = check_items(ids, vectors, self.dim)
        replaced = self._nodes.find(ids)
        nodes = np.arange(len(self._ids), len(self._ids) + len(ids))
        with faiss_threads(self.threads):
            self._graph.add(vectors)
        self._ids[replaced[replaced >= 0]] = NO_ITEM
        self._ids = np.concatenate([self._ids, ids])
        self._nodes.move(ids[replaced >= 0], nodes[replaced >= 0])
        self._nodes.insert(ids[replaced < 0], nodes[replaced < 0])

    def remove(self, ids: Ids) -> None:
        """See `Index.remove`."""
        ids = check_ids(ids)
        nodes = self._nodes.find(ids)
        check_known(ids, nodes >= 0)
        self._ids[nodes] = NO_ITEM
        self._nodes.delete(ids)

    def search(self, queries: Vectors, k: int) -> tuple[Ids, Vectors]:
        """See `Index.search`."""
        queries = check_search(queries, self.dim, k)
        ids = np.full((len(queries), k), NO_ITEM, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        found = min(k, len(self))
        if not found:
            return ids, scores
        with faiss_threads(self.threads):
            best, nodes = self._graph.search(queries, found, params=self._walk(found))
        ids[:, :found] = np.where(nodes >= 0, self._ids[nodes], NO_ITEM)
        scores[:, :found] = np.where(nodes >= 0, best, -np.inf)
        return ids, scores

    def save(self, folder: Path) -> None:
        """See `Index.save`: graph.faiss and ids.npy."""

        def write(partial: Path) -> None:
            faiss.write_index(self._graph, str(partial / "graph.faiss"))
            np.save(partial / "ids.npy", self._ids)

        settings = {"dim": self.dim, "m": self.m, "ef_construction": self.ef_construction, "ef_search": self.ef_search}
        write_index(folder, HNSW, settings, write)

    @classmethod
    def load(cls, folder: Path, threads: int = 1) -> Self:
        """See `Index.load`."""
        index = cls(**read_settings(folder, HNSW), threads=threads)
        index._graph = read_file(folder / "graph.faiss", faiss.read_index)
        index._ids = read_array(folder / "ids.npy")
        nodes = np.flatnonzero(index._ids != NO_ITEM)
        index._nodes = IdMap(index._ids[nodes], nodes)
        return index

    def _walk(self, k: int) -> faiss.SearchParametersHNSW:
        """The candidates of a walk, and which nodes may be returned."""
        if len(self) == len(self._ids):
            return faiss.SearchParametersHNSW(efSearch=max(self.ef_search, k))
        share = len(self) / len(self._ids)
        alive = np.packbits(self._ids != NO_ITEM, bitorder="little")
        return faiss.SearchParametersHNSW(
            efSearch=math.ceil(max(self.ef_search, k) / share), sel=faiss.IDSelectorBitmap(alive)
        )
