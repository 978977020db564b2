"""The job writes what it was asked for; on real data int8 tables cost next to nothing."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from raysys.bundle import load_bundle
from raysys.train.metrics import Evaluator

ROOT = Path(__file__).parents[2]
MOST_INT8, MOST_INT4 = 2e-4, 5e-3


def export(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
    runpy.run_path(str(ROOT / "jobs" / "export.py"), run_name="__main__")


def is_quantised(model):
    return any(value.dtype == torch.uint8 for value in model.state_dict().values())


def test_the_job_quantises_and_takes_artifacts_along(tiny_run, tmp_path, monkeypatch, capsys):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "codes.bin").write_bytes(b"codes")
    output = tmp_path / "bundle"
    export(monkeypatch, f"run={tiny_run}", f"output={output}", "quantize=int8", f"artifacts={tmp_path}/files")
    assert capsys.readouterr().out == f"bundle: {output}\n"
    bundle = load_bundle(output)
    assert bundle.artifact("codes.bin").read_bytes() == b"codes"
    assert is_quantised(bundle.model)
    with pytest.raises(SystemExit) as exit:
        export(monkeypatch, f"run={tiny_run}", f"output={output}", "quantize=int6")
    assert exit.value.code == 2
    assert "unknown kind of quantised tables 'int6'" in capsys.readouterr().err
    assert is_quantised(load_bundle(output).model)


@pytest.mark.experiment
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_int8_tables_cost_less_than_two_parts_in_ten_thousand_of_ne(tmp_path, monkeypatch, record_figure, seed):
    train = [sys.executable, "jobs/train.py", "experiment=movielens", "trainer=local", f"seed={seed}", "run_id=a"]
    subprocess.run([*train, f"data.folder={tmp_path}/data", f"runs_folder={tmp_path}/runs"], cwd=ROOT, check=True)
    run, table, ne = tmp_path / "runs" / "a", pq.read_table(tmp_path / "data" / "test.parquet"), {}
    for kind in ("null", "int8", "int4"):
        export(monkeypatch, f"run={run}", f"output={tmp_path / kind}", f"quantize={kind}")
        bundle = load_bundle(tmp_path / kind)
        evaluator, batch = Evaluator(bundle.schema), bundle.transforms.to_batch(table)
        with torch.no_grad():
            evaluator.update(bundle.model(batch).logits, batch)
        ne[kind] = evaluator.compute()["tasks"]["like"]["ne"]
    for kind, most in (("int8", MOST_INT8), ("int4", MOST_INT4)):
        change = ne[kind] / ne["null"] - 1
        record_figure(f"{kind} relative change of NE", change, seed)
        assert abs(change) <= most
