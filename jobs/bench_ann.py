"""Measure the indexes and the libraries that they were chosen among: a table, and OUT/ann.json.

Each has a process of its own with one thread and the same clustered vectors. ann_recall is the share of the true 100 best
that is found. Times are of the CPU, rates the best of three turns. A fifth of the items is removed and as many others
added; churned_recall is that of what there is then. usearch and hnswlib are no dependencies: `pip install usearch hnswlib`,
then `--kinds`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import bench_result
import numpy as np
import psutil
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from raysys.data.synthetic.vectors import clustered_vectors
from raysys.models.retrieval.indexes.exact import Exact
from raysys.models.retrieval.indexes.hnsw import HNSW
from raysys.models.retrieval.indexes.index import Ids, Vectors
from raysys.models.retrieval.indexes.ivf_pq import IVFPQ
from raysys.strict_json import to_plain

DIM, K, QUERIES, TURNS, SEED = 64, 100, 960, 3, 0
BATCHES = (1, 64)
M, EF_CONSTRUCTION, EF_SEARCH = 16, 128, 200
DECIMALS = {"build_s": 1, "memory_mib": 0, "file_mib": 0, "ann_recall": 3, "qps_1": 0, "qps_64": 0, "remove_us": 1}
DECIMALS |= {"add_us": 1, "churned_recall": 3}
LIBRARIES = ("faiss-cpu", "usearch", "hnswlib")


class Searchable(Protocol):
    """What is measured of an index, ours or another library's own."""

    def add(self, ids: Ids, vectors: Vectors) -> None:
        """Add new items."""

    def remove(self, ids: Ids) -> None:
        """Remove known items."""

    def search(self, queries: Vectors, k: int) -> tuple[Ids, Vectors]:
        """Ids and scores [Q, k]."""

    def save(self, folder: Path) -> None:
        """Write files into a folder, which `save` makes."""


class Usearch:
    """HNSW of usearch, with the same settings as ours."""

    def __init__(self, items: int) -> None:
        from usearch.index import Index

        self._index = Index(
            ndim=DIM,
            metric="ip",
            dtype="f32",
            connectivity=M,
            expansion_add=EF_CONSTRUCTION,
            expansion_search=EF_SEARCH,
        )

    def add(self, ids: Ids, vectors: Vectors) -> None:
        """See `Searchable`."""
        self._index.add(ids.view(np.uint64), vectors, threads=1)

    def remove(self, ids: Ids) -> None:
        """See `Searchable`."""
        self._index.remove(ids.view(np.uint64), threads=1)

    def search(self, queries: Vectors, k: int) -> tuple[Ids, Vectors]:
        """See `Searchable`."""
        found = self._index.search(queries, k, threads=1)
        return found.keys.astype(np.uint64).view(np.int64).reshape(-1, k), found.distances.reshape(-1, k)

    def save(self, folder: Path) -> None:
        """See `Searchable`."""
        folder.mkdir()
        self._index.save(str(folder / "index"))


class Hnswlib:
    """HNSW of hnswlib, with the same settings as ours; removed items leave room for later ones."""

    def __init__(self, items: int) -> None:
        import hnswlib

        self._index = hnswlib.Index("ip", DIM)
        self._index.init_index(items, M=M, ef_construction=EF_CONSTRUCTION, allow_replace_deleted=True)
        self._index.set_ef(EF_SEARCH)

    def add(self, ids: Ids, vectors: Vectors) -> None:
        """See `Searchable`."""
        self._index.add_items(vectors, ids, num_threads=1, replace_deleted=True)

    def remove(self, ids: Ids) -> None:
        """See `Searchable`."""
        for item in ids.tolist():
            self._index.mark_deleted(item)

    def search(self, queries: Vectors, k: int) -> tuple[Ids, Vectors]:
        """See `Searchable`."""
        ids, distances = self._index.knn_query(queries, k, num_threads=1)
        return ids.astype(np.int64), distances

    def save(self, folder: Path) -> None:
        """See `Searchable`."""
        folder.mkdir()
        self._index.save_index(str(folder / "index"))


KINDS: dict[str, Callable[[int], Searchable]] = {
    "exact": lambda items: Exact(DIM),
    "IVF-PQ (faiss)": lambda items: IVFPQ(DIM),
    "HNSW (faiss)": lambda items: HNSW(DIM, m=M, ef_construction=EF_CONSTRUCTION, ef_search=EF_SEARCH),
}
RIVALS: dict[str, Callable[[int], Searchable]] = {"HNSW (usearch)": Usearch, "HNSW (hnswlib)": Hnswlib}


def measure(kind: str, items: int) -> dict[str, Any]:
    """All columns of one index of so many items."""
    vectors, queries = clustered_vectors(items + items // 5, QUERIES, DIM, SEED)
    ids = np.random.default_rng(SEED).permutation(2 * len(vectors))[: len(vectors)].astype(np.int64)
    old, new = slice(0, items), slice(items, None)
    memory = psutil.Process().memory_info().rss
    index = (KINDS | RIVALS)[kind](items)
    row: dict[str, Any] = {"kind": kind, "items": items}
    row["build_s"] = _seconds(lambda: index.add(ids[old], vectors[old]))
    row["memory_mib"] = (psutil.Process().memory_info().rss - memory) / 2**20
    with tempfile.TemporaryDirectory() as folder:
        index.save(Path(folder) / "index")
        row["file_mib"] = sum(file.stat().st_size for file in (Path(folder) / "index").iterdir()) / 2**20
    row["ann_recall"] = _recall(index, ids[old], vectors[old], queries)
    for size in BATCHES:
        row[f"qps_{size}"] = max(_rate(index, queries, size) for _ in range(TURNS))
    gone = np.random.default_rng(SEED + 1).permutation(items)[: items // 5]
    row["remove_us"] = _seconds(lambda: index.remove(ids[gone])) / len(gone) * 1e6
    row["add_us"] = _seconds(lambda: index.add(ids[new], vectors[new])) / (items // 5) * 1e6
    kept = np.setdiff1d(np.arange(len(ids)), gone)
    row["churned_recall"] = _recall(index, ids[kept], vectors[kept], queries)
    assert not np.isin(index.search(queries, K)[0], ids[gone]).any()
    return row


def _recall(index: Searchable, ids: Ids, vectors: Vectors, queries: NDArray[np.float32]) -> float:
    exact = Exact(DIM)
    exact.add(ids, vectors)
    pairs = zip(index.search(queries, K)[0], exact.search(queries, K)[0], strict=True)
    return float(np.mean([len(np.intersect1d(found, true)) / K for found, true in pairs]))


def _rate(index: Searchable, queries: Vectors, size: int) -> float:
    """Queries a second in batches of `size`, over at most a fifth of a second of single queries."""
    count = QUERIES if size > 1 else QUERIES // 5
    starts = range(0, count, size)
    return count / _seconds(lambda: [index.search(queries[start : start + size], K) for start in starts])


def _seconds(call: Callable[[], object]) -> float:
    """Of CPU time, which is the wall clock's where nothing else runs, as there is one thread."""
    started = time.process_time()
    call()
    return time.process_time() - started


def in_own_process(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a picklable call returns in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(call).result()


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """The table."""
    table = Table(box=None, header_style="bold")
    for title in ("items", "index", *DECIMALS):
        table.add_column(title, no_wrap=True, justify="left" if title == "index" else "right")
    for row in rows:
        table.add_row(
            f"{row['items']:,}", row["kind"], *(f"{row[name]:,.{digits}f}" for name, digits in DECIMALS.items())
        )
    console.print(table)


def main() -> None:
    """Measure, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of ann.json")
    parser.add_argument("--items", type=int, nargs="+", default=[100_000, 1_000_000], help="sizes of the catalogue")
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS, *RIVALS], default=list(KINDS), help="what to measure")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    about = bench_result.machine()
    about["versions"] |= {name: version(name) for name in LIBRARIES if find_spec(name.removesuffix("-cpu"))}
    rows: list[dict[str, Any]] = []
    console = Console(width=None if sys.stdout.isatty() else 160)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "ann.json"
    for items in options.items:
        for kind in options.kinds:
            rows.append(in_own_process(partial(measure, kind, items)))
            about["load_after"] = os.getloadavg()[0]
            path.write_text(json.dumps(to_plain({**about, "dim": DIM, "seed": SEED, "rows": rows}), indent=1) + "\n")
    show(rows, console)
    console.print(str(path), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
