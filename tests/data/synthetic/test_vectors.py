"""Synthetic vectors: of length 1, the same for a seed, in few directions, and near each other in clusters."""

from __future__ import annotations

import numpy as np
import pytest

from raysys.data.synthetic.vectors import RANK, clustered_vectors


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_unit_vectors_in_few_directions_with_near_neighbours(seed):
    items, queries = clustered_vectors(5000, 100, 64, seed)
    assert items.shape == (5000, 64)
    assert queries.shape == (100, 64)
    assert items.dtype == queries.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(items, axis=1), 1, atol=1e-6)
    variances = np.linalg.eigvalsh(np.cov(items.T.astype(np.float64)))[::-1]
    assert variances[:RANK].sum() > 0.98 * variances.sum()
    generator = np.random.default_rng(seed)
    normal = generator.standard_normal((5000, 64))
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    assert np.median((queries @ items.T).max(1)) > 0.8 > 0.6 > np.median((queries @ normal.T).max(1))


def test_a_seed_gives_the_same_vectors_and_another_one_others():
    first, again, other = (clustered_vectors(200, 5, 8, seed) for seed in (0, 0, 1))
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.allclose(a, c)
