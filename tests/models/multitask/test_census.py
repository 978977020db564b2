"""AdaTT against MMoE on Census-Income, whose tasks are income above 50,000 and never married."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, variance

import pytest

from raysys.config import compose, instantiate
from raysys.train.record import read_record
from raysys.train.trainer import fit, prepare

DOWNLOADS = Path(__file__).parents[3] / "data" / "downloads"
SEEDS = range(3)
MODELS = {
    "AdaTT-sp": ["model=adatt", "model.head.shared_experts=0", "model.head.widths=[[32],[16]]"],
    "MMoE": ["model=mmoe", "model.head.widths=[[32,16]]"],
}
SIZES = ["model.embedding_dim=4", "model.bottom=[64]", "model.tower=[8]"]
TRAINING = ["train.batch_size=1024", "train.epochs=16", "train.early_stopping={metric: auc, task: all, patience: 16}"]


@pytest.mark.experiment
def test_adatt_is_no_worse_than_mmoe_on_income(tmp_path, record_figure):
    """Both have the test file's 59,856 training rows, group G1; the epoch with the best mean AUC on the validation split is tested."""
    income = {name: [] for name in MODELS}
    for name, overrides in MODELS.items():
        for seed in SEEDS:
            folders = [
                f"data.folder={tmp_path}/census",
                f"data.prepare.downloads={DOWNLOADS}",
                f"runs_folder={tmp_path}",
            ]
            run = [f"seed={seed}", f"run_id={name}-{seed}"]
            config = compose(["data=census", *overrides, *SIZES, *TRAINING, *folders, *run])
            instantiate(config["data"]["prepare"])
            prepared = prepare(config)
            fit(prepared, [])
            record = read_record(prepared.job.folder)
            for task, metrics in record["metrics"]["test"].items():
                for metric in ("auc", "ne"):
                    record_figure(f"{name} test {task} {metric}", metrics[metric], seed)
            record_figure(f"{name} dense parameters", record["parameters"]["dense"], seed)
            income[name].append(record["metrics"]["test"]["income"]["auc"])
    adatt, mmoe = income["AdaTT-sp"], income["MMoE"]
    standard_error = ((variance(adatt) + variance(mmoe)) / len(SEEDS)) ** 0.5
    assert min(adatt + mmoe) > 0.945
    assert mean(adatt) >= mean(mmoe) - 2 * standard_error
