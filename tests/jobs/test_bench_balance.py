"""The bench of gradient balancing at tiny sizes. No timing is asserted."""

from __future__ import annotations

import sys


def test_every_objective_is_in_the_table(monkeypatch, capsys, jobs):
    monkeypatch.setattr(sys, "argv", ["bench_balance.py", "--rows", "8", "--rounds", "1", "--tasks", "2", "9"])
    jobs("bench_balance").main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| | towers, 2 tasks | towers, 9 tasks | mmoe, 2 tasks | mmoe, 9 tasks |"
    rows = {
        name: [float(cell.rstrip("%")) for cell in cells]
        for name, *cells in (line[2:-2].split(" | ") for line in lines[2:])
    }
    assert {"sum, ms", "sum, again", "added by minnorm"} < set(rows)
    assert max(rows["added by minnorm"]) < 100
    assert {"minnorm", "moco", "normeq", "pcgrad", "gradnorm", "mgda", "uncertainty", "shared parameters"} < set(rows)
    assert all(value > 0 for cells in rows.values() for value in cells)
