"""How many threads a library takes for one call: set in the thread that calls, and set back, since others rely on theirs.

The number is OpenMP's for the calling thread, and a server has many threads. torch and faiss share one OpenMP in a process
that has imported both, so what is set for one counts for the other, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import faiss
import torch


@contextmanager
def faiss_threads(threads: int) -> Iterator[None]:
    """Give faiss this many threads, and BLAS where that pays with so many.

    faiss takes BLAS for products of at least 128,000 queries times columns, which is meant for dozens of threads. With one
    the break-even is at 800, and to learn 32 times 256 centroids from 20,000 pairs took 12 times as long without BLAS
    (faiss pull requests 5022 and 5109).
    """
    before = faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_threshold
    faiss.omp_set_num_threads(threads)
    faiss.cvar.distance_compute_blas_threshold = 800 * threads
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before[0])
        faiss.cvar.distance_compute_blas_threshold = before[1]


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Give torch this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
