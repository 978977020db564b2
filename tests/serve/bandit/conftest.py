"""What tests of Online Matching share: a small graph with user vectors around its centroids, and feedback on it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from raysys.models.retrieval.indexes.exact import Exact
from raysys.serve.bandit.build import build_graph


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def unit_vectors():
    """`unit_vectors(rng, n, D)`: directions that are drawn evenly."""
    return lambda rng, rows, dim=8: unit(rng.normal(size=(rows, dim)))


@pytest.fixture(params=[0, 1, 2])
def rng(request):
    """Three generators."""
    return np.random.default_rng(request.param)


@pytest.fixture
def small(unit_vectors):
    """300 users, 50 items with ids 0, 3, 6, …, and the graph of 12 clusters with 6 items each."""
    rng = np.random.default_rng(7)
    users, items, vectors = unit_vectors(rng, 300), np.arange(0, 150, 3), unit_vectors(rng, 50)
    index = Exact(8)
    index.add(items, vectors)
    graph = build_graph(users, index, clusters=12, width=6)
    return SimpleNamespace(users=users, items=items, vectors=vectors, index=index, graph=graph)
