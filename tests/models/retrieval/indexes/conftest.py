"""What tests of the indexes share: each kind, and one filled with clustered vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from raysys.data.synthetic.vectors import clustered_vectors
from raysys.models.retrieval.indexes.exact import Exact
from raysys.models.retrieval.indexes.hnsw import HNSW
from raysys.models.retrieval.indexes.index import Index
from raysys.models.retrieval.indexes.ivf_pq import IVFPQ

DIM, ITEMS = 32, 3000


@dataclass
class Filled:
    """An index and what was put in."""

    index: Index
    ids: np.ndarray
    vectors: np.ndarray
    queries: np.ndarray


@pytest.fixture(params=[Exact, HNSW, IVFPQ], ids=lambda kind: kind.__name__)
def kind(request) -> type[Index]:
    return request.param


@pytest.fixture
def fill() -> Callable[..., Filled]:
    """An index of a kind with items of arbitrary ids, and 50 queries."""

    def filled(kind: type[Index], seed: int = 0, items: int = ITEMS) -> Filled:
        vectors, queries = clustered_vectors(items, 50, DIM, seed)
        index, ids = kind(DIM), arbitrary_ids(items, seed)
        index.add(ids, vectors)
        return Filled(index, ids, vectors, queries)

    return filled


def arbitrary_ids(count: int, seed: int) -> np.ndarray:
    """Distinct ids from all of int64, the smallest and the largest among them."""
    generator = np.random.default_rng(seed)
    drawn = np.unique(generator.integers(-(2**62), 2**62, 2 * count))
    return generator.permutation(np.append(generator.permutation(drawn)[: count - 3], [-(2**63), 0, 2**63 - 1]))
