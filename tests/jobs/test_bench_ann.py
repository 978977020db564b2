"""The comparison of indexes at a tiny size: every column is there, and recall is that of the index. No time is asserted."""

from __future__ import annotations

import json
import sys

import pytest


def test_a_row_for_each_index(monkeypatch, tmp_path, jobs, capsys):
    bench = jobs("bench_ann")
    monkeypatch.setattr(bench, "in_own_process", lambda call: call())
    monkeypatch.setattr(sys, "argv", ["bench_ann.py", "--items", "1000", "--out", str(tmp_path)])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    bench.main()
    assert capsys.readouterr().out.count("1,000") == 3
    content = json.loads((tmp_path / "ann.json").read_text())
    assert [row["kind"] for row in content["rows"]] == list(bench.KINDS)
    assert content["versions"]["faiss-cpu"]
    for row in content["rows"]:
        assert row.keys() >= bench.DECIMALS.keys()
        assert row["ann_recall"] > 0.95
        assert row["churned_recall"] > 0.95
    assert content["rows"][0]["ann_recall"] == pytest.approx(1)
