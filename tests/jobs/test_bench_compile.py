"""The bench of compiled models at tiny sizes. No timing is asserted."""

from __future__ import annotations

import json
import sys


def test_forms_are_measured_and_give_what_the_model_does(tmp_path, monkeypatch, capsys, jobs):
    monkeypatch.setattr(sys, "argv", ["bench_compile.py", "--quick", "--out", str(tmp_path)])
    jobs("bench_compile").main()
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "compile.json").read_text())["models"]["DHEN"]
    assert [row["form"] for row in rows] == ["eager", "torch.jit, frozen", "AOTInductor"]
    for row in rows:
        assert row["form"] in printed
        assert row["error"] <= 1e-5
        assert min(row["wall_1"], row["cpu_1"], row["gain_1"], row["wall_5"], row["cpu_5"], row["gain_5"]) > 0
