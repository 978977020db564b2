from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from raysys.data.profile import estimate_distinct, profile
from raysys.errors import UserError


def test_every_row_of_a_small_table_is_counted(tmp_path):
    table = pa.table(
        {
            "number": pa.array([1.5, None, -2.0, math.nan]),
            "bag": pa.array([[1, 2], [], None, [2, 2, 7]]),
            "text": pa.array(["ab", None, "ab", "abcd"]),
        }
    )
    pq.write_table(table, tmp_path / "log.parquet")
    found = profile(tmp_path / "log.parquet")
    number, bag, text = found.columns.values()
    assert found.is_exact
    assert (number.kind, number.null_share, number.low, number.high, number.median) == (
        "number",
        0.25,
        -2.0,
        1.5,
        -0.25,
    )
    assert (bag.is_list, bag.distinct, bag.lengths, bag.low, bag.high) == (True, 3, (0, 3), 1.0, 7.0)
    assert (text.distinct, text.text_length) == (2, 8 / 3)


def test_a_large_parquet_is_sampled_evenly_and_a_large_csv_from_its_start(tmp_path):
    rows = 10_000
    table = pa.table({"n": np.arange(rows), "id": np.random.default_rng(0).integers(0, 50, rows)})
    pq.write_table(table, tmp_path / "log.parquet", row_group_size=100)
    pacsv.write_csv(table, tmp_path / "log.csv")
    found = profile(tmp_path / "log.parquet", max_rows=1000)
    assert (found.rows, found.total_rows, found.is_exact) == (1000, rows, False)
    assert (found.columns["n"].low, found.columns["n"].high) == (0, rows - 1)
    assert found.columns["id"].distinct == 50
    assert found.columns["n"].distinct == pytest.approx(1000 * math.sqrt(10), rel=1e-3)
    found = profile(tmp_path / "log.csv", max_rows=1000)
    assert (found.rows, found.total_rows, found.columns["n"].high) == (1000, None, 999)
    assert profile(tmp_path / "log.csv", max_rows=rows).is_exact


def test_the_estimate_of_distinct_values_is_exact_without_sampling_and_bounded_with():
    rng = np.random.default_rng(1)
    column = rng.zipf(1.3, 400_000) % 100_000
    truth, share = len(np.unique(column)), 20
    assert estimate_distinct(pa.array(column), 1.0) == truth
    estimate = estimate_distinct(pa.array(rng.choice(column, len(column) // share, replace=False)), share)
    assert truth / math.sqrt(share) < estimate < truth * math.sqrt(share)  # the estimator's guarantee


def test_an_empty_table_is_refused(tmp_path):
    pq.write_table(pa.table({"a": pa.array([], pa.int64())}), tmp_path / "log.parquet")
    with pytest.raises(UserError, match=r"log.parquet: no rows"):
        profile(tmp_path / "log.parquet")
