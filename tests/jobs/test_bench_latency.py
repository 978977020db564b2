"""The latency bench at tiny sizes. No timing is asserted."""

from __future__ import annotations

import json
import sys


def test_every_form_is_measured_and_pruning_costs_less(tmp_path, monkeypatch, capsys, jobs):
    monkeypatch.setattr(sys, "argv", ["bench_latency.py", "--quick", "--out", str(tmp_path)])
    jobs("bench_latency").main()
    printed = capsys.readouterr().out
    rows = {row["model"]: row for row in json.loads((tmp_path / "latency.json").read_text())["rows"]}
    assert len(rows) == 8
    for name, row in rows.items():
        assert name in printed
        assert min(row["wall_1"], row["cpu_1"], row["wall_512"], row["cpu_512"]) > 0
        assert len(row["turns_512"]) == 3
        if not name.endswith("pruned"):
            pruned = rows[f"{name}, pruned"]
            assert pruned["flops_per_row"] < row["flops_per_row"]
            fewer = pruned["dense_parameters"] < row["dense_parameters"]
            assert fewer == (not name.startswith("vanilla"))
