"""The tables of the comparison of indexes."""

from __future__ import annotations

import pytest

from raysys.report.index_comparison import index_table, scored_slope


def run(items, scored, **rows):
    hsnn = {"scored": scored, "recall": 0.85, "true": 0.5, "taken": 0.25, "ms": 1.0}
    return {"items": items, "rows": {"hsnn": hsnn, **rows}}


def test_the_table_has_means_and_deviations_over_seeds():
    other = {"scored": 7.0, "recall": 1.0, "taken": 0.5, "ms": 2.0}
    table = index_table({"small": {"0": run(100, 40.0), "1": run(100, 60.0, other=other)}}).splitlines()
    assert table[2] == ("| small | 100 | hsnn | 50 ± 14 | 0.850 ± 0.000 | 0.500 ± 0.000 | 0.250 ± 0.000 | 1.0 ± 0.0 |")
    assert table[3] == "| small | 100 | other | 7 | 1.000 |  | 0.500 | 2.0 |"
    assert len(table) == 4


def test_the_slope_is_of_sizes_of_made_up_catalogues():
    sets = {f"s{n}": {"0": run(n, 3 * n**0.6)} for n in (100, 1000, 10000)}
    real = run(500, 400.0)
    del real["rows"]["hsnn"]["true"]
    assert scored_slope(sets | {"real": {"0": real}}) == pytest.approx(0.6)
    assert scored_slope({"s": sets["s100"], "real": {"0": real}}) is None
    assert "slope of scored over items: 0.60" in index_table(sets)
