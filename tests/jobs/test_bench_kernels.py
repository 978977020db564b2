"""The profile of kernels at tiny sizes: what counts, and that the parts of a step are there. No share is asserted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest


@pytest.fixture
def bench(monkeypatch, tmp_path, jobs):
    monkeypatch.chdir(tmp_path)
    return jobs("bench_kernels")


def test_a_share_is_that_of_the_named_kernels_in_the_whole_step(bench):
    table = {"aten::mm": 3.0, "aten::bmm": 2.0, "aten::_softmax": 1.0, "aten::add": 3.0, bench.WHOLE: 10.0}
    assert bench.shares(table) == pytest.approx({"products": 0.5, "softmax": 0.1, "look-ups": 0.0, "together": 0.6})


def test_both_parts_of_a_step_are_recorded(bench, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--quick", "--out", "out"])
    monkeypatch.setattr(bench, "FORMS", {"Hiformer": [*bench.FORMS["Hiformer"], "model.embedding_dim=8"]})
    bench.main()
    assert capsys.readouterr().out.count("Hiformer") == 2
    parts = json.loads(Path("out/kernels.json").read_text())["Hiformer"]
    assert set(parts) == {"train step", "forward and backward"}
    for part, recorded in parts.items():
        times = recorded["milliseconds"]
        whole = times.pop(bench.WHOLE)
        assert sum(times.values()) == pytest.approx(whole)
        kinds = {kind: [name for name in names if times.get(name, 0) > 0] for kind, names in bench.KERNELS.items()}
        assert all(kinds.values()), kinds  # renamed kernels would vanish without a word
        assert ("Optimizer.step#AdamW.step" in times) == (part == "train step")
