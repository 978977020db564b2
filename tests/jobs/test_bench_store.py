"""The comparison of feature stores at a tiny size: every column is there, and rivals give the same rows. No time is asserted."""

from __future__ import annotations

import json
import sys

import pyarrow as pa


def test_a_row_for_each_store(monkeypatch, tmp_path, jobs, capsys):
    bench = jobs("bench_store")
    monkeypatch.setattr(bench, "SECONDS", 0.05)
    monkeypatch.setattr(sys, "argv", ["bench_store.py", "--rows", "300", "--out", str(tmp_path)])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    bench.main()
    assert capsys.readouterr().out.count("300") >= 2
    rows = json.loads((tmp_path / "store.json").read_text())["rows"]
    assert [row["kind"] for row in rows] == ["Arrow", "SQLite"]
    columns = {"build_s", "size_mib", "open_ms", "p50_1_us", "p99_200_us", "memory_mib", "two_readers_rows_s"}
    for row in rows:
        assert row.keys() >= columns | {"update_1_ms", "update_200_ms"}
        assert all(value > 0 for name, value in row.items() if name in columns - {"memory_mib"})


def test_a_rival_gives_what_the_store_gives(tmp_path, jobs):
    bench = jobs("bench_store")
    rows = bench.item_rows(300)
    store = bench.ArrowStore.create(tmp_path / "arrow", rows, bench.KEY)
    rival = bench.SQLite(tmp_path / "sqlite", bench.SCHEMA, bench.KEY, writes=True)
    rival.put(rows)
    keys = pa.chunked_array([rows[bench.KEY].slice(5, 20).combine_chunks(), pa.array([-1])]).to_numpy()
    expected, found = store.get(keys)
    got, found_too = rival.get(keys)
    assert got.equals(expected)
    assert found.tolist() == found_too.tolist()
