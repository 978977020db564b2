from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from raysys.data.prepare.past import Past

ROWS = 300


@pytest.fixture(scope="module")
def log():
    """Rows of 12 groups at 20 times, so that ties are common, and which of them may be seen."""
    rng = np.random.default_rng(3)
    group, time = rng.integers(100, 112, ROWS), rng.integers(0, 20, ROWS)
    return group, time, rng.random(ROWS) < 0.7, rng.normal(size=ROWS)


def seen(log, row):
    """The past of a row by its definition: visible, same group, strictly earlier; oldest first, ties by row number."""
    group, time, visible, _ = log
    rows = [n for n in range(ROWS) if visible[n] and group[n] == group[row] and time[n] < time[row]]
    return sorted(rows, key=lambda n: (time[n], n))


def test_counts_sums_and_means_follow_the_definition(log):
    group, time, visible, value = log
    past = Past.of(group, time, visible)
    expected = [seen(log, row) for row in range(ROWS)]
    assert past.count.tolist() == [len(rows) for rows in expected]
    assert past.sum(value) == pytest.approx([value[rows].sum() for rows in expected], abs=1e-12)
    assert past.sum(value, last=4) == pytest.approx([value[rows[-4:]].sum() for rows in expected], abs=1e-12)
    means = [(value[rows].sum() + 2 * 0.5) / (len(rows) + 2) for rows in expected]
    assert past.mean(value, prior=0.5, strength=2) == pytest.approx(means, abs=1e-12)


def test_sums_of_vectors_are_sums_of_their_columns(log):
    group, time, visible, value = log
    past = Past.of(group, time, visible)
    both = past.sum(np.stack([value, value**2], axis=1))  # [N, 2]
    assert np.array_equal(both[:, 0], past.sum(value))
    assert np.array_equal(both[:, 1], past.sum(value**2))


def test_lists_hold_the_most_recent_rows_oldest_first(log):
    group, time, visible, _ = log
    lists = Past.of(group, time, visible).lists(pa.array(np.arange(ROWS)), last=5)
    assert lists.to_pylist() == [seen(log, row)[-5:] for row in range(ROWS)]


def test_what_is_not_visible_changes_nothing(log):
    group, time, visible, value = log
    changed = np.where(visible, value, np.nan)
    assert np.array_equal(Past.of(group, time, visible).sum(changed), Past.of(group, time, visible).sum(value))
