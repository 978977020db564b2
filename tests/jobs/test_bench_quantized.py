"""The bench of quantised tables at tiny sizes. No timing is asserted."""

from __future__ import annotations

import json
import sys


def test_every_form_is_measured_and_takes_its_bytes(tmp_path, monkeypatch, capsys, jobs):
    monkeypatch.setattr(sys, "argv", ["bench_quantized.py", "--quick", "--out", str(tmp_path)])
    jobs("bench_quantized").main()
    printed = capsys.readouterr().out
    rows = {row["form"]: row for row in json.loads((tmp_path / "quantized.json").read_text())["rows"]}
    shares = {"fp32": 4 * 16, "int8": 16 + 8, "int4": 16 // 2 + 4, "torchrec.quant int8": 32}
    assert {name: row["bytes"] for name, row in rows.items()} == {name: 26 * 50 * size for name, size in shares.items()}
    for name, row in rows.items():
        assert name in printed
        assert min(row["wall_2x1"], row["cpu_2x20"], row["gain_2x20"]) > 0
