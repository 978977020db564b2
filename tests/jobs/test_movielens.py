"""What `make train` promises, over five seeds: figures of docs/results.md, made anew."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest

from raysys.train.record import read_record

ROOT = Path(__file__).parents[2]
LEAST_AUC, MOST_NE = 0.786, 0.805


@pytest.mark.experiment
def test_movielens_is_learnt_by_two_workers_with_every_seed(tmp_path, record_figure):
    found = {"auc": [], "ne": []}
    for seed in range(5):
        train = [
            sys.executable,
            "jobs/train.py",
            "experiment=movielens",
            "trainer=ray",
            f"seed={seed}",
            f"run_id={seed}",
        ]
        subprocess.run([*train, f"data.folder={tmp_path}/data", f"runs_folder={tmp_path}/runs"], cwd=ROOT, check=True)
        like = read_record(tmp_path / "runs" / str(seed))["metrics"]["test"]["like"]
        for name, values in found.items():
            values.append(like[name])
            record_figure(f"test {name}", like[name], seed)
    assert found["auc"][0] >= LEAST_AUC
    assert found["ne"][0] <= MOST_NE
    assert mean(found["auc"]) >= LEAST_AUC
    assert mean(found["ne"]) <= MOST_NE
