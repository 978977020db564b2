"""ESMM on a log with a known conversion rate of every row, beside a tower that learns it from the rows with a click only."""

from __future__ import annotations

from statistics import mean

import numpy as np
import pyarrow.parquet as pq
import pytest

from raysys.config import compose, instantiate
from raysys.data.synthetic.spec import TRUTH
from raysys.train.ranking_metrics import calibration, log_loss
from raysys.train.trainer import fit, prepare

SEEDS = range(3)
BOTH = "click_and_conversion"
SPEC = {
    "entire_space": "true",
    "base_rates": "[0.05,0.2,0.05]",
    "correlation": "0.8",  # who clicks converts more often
    "cardinalities": "[10,20,50,100,100]",
    "num_users": "2000",
    "num_items": "1000",
    "effects": "1.0",
    "num_pairs": "3",
    **dict.fromkeys(("heterogeneous", "num_heterogeneous", "third_order", "num_triples"), "0"),
    **dict.fromkeys(("history_length", "history", "order"), "0"),
}
SIZES = ["model.embedding_dim=8", "model.bottom=[32]", "model.tower=[32]"]
TRAINING = ["train.batch_size=512", "train.epochs=4", "train.evaluate_every=50"]
MODELS = {  # the same tables and towers; each has a label of conversions that it learns, and the log-loss that stops it
    "esmm": [f"model.head.conversion={BOTH}", "objective.task_weights={conversion: 0}", BOTH],
    "clicked": ["model/head=towers", f"objective.task_weights={{{BOTH}: 0}}", "conversion"],
}


@pytest.mark.experiment
def test_the_conversion_rate_of_all_rows_is_better_learned_from_all_rows(tmp_path, record_figure):
    """Over all rows, 95% of which were not clicked: calibration to the true rates, and log-loss against them."""
    log = ["data=synthetic", f"data.folder={tmp_path}/log", "data.prepare.rows=60000", "data.prepare.processes=1"]
    log += [f"data.prepare.spec.{key}={value}" for key, value in SPEC.items()]
    found = {name: {"calibration": [], "log_loss": []} for name in MODELS}
    for name, (*overrides, stop) in MODELS.items():
        for seed in SEEDS:
            stopping = f"train.early_stopping={{metric: log_loss, task: {stop}, patience: 6}}"
            run = [f"seed={seed}", f"run_id={name}-{seed}", f"runs_folder={tmp_path}", stopping]
            config = compose(["model=esmm", *log, *overrides, *SIZES, *TRAINING, *run])
            instantiate(config["data"]["prepare"])
            prepared = prepare(config)
            fit(prepared, [])
            scores = pq.read_table(prepared.job.folder / "predictions/test.parquet").sort_by("example_id")
            rows = pq.read_table(tmp_path / "log/test")
            assert scores["example_id"].equals(rows["example_id"])
            rate = scores["conversion_probability"].to_numpy()
            if name == "esmm":
                rate = scores[f"{BOTH}_probability"].to_numpy() / scores["click_probability"].to_numpy()
            true = rows["conversion" + TRUTH].to_numpy()
            everywhere = {"calibration": calibration(true, rate), "log_loss": log_loss(true, rate)}
            clicked = rows["click"].to_numpy() == 1
            record_figure(f"{name}: calibration of clicked rows", calibration(true[clicked], rate[clicked]), seed)
            for metric, value in everywhere.items():
                record_figure(f"{name}: {metric} of all rows", value, seed)
                found[name][metric].append(value)
    record_figure("log_loss of the true rates", log_loss(true, true))
    esmm, clicked_only = found["esmm"], found["clicked"]
    assert min(clicked_only["calibration"]) > 1.2  # the few who click are no sample of all
    assert all(1 < ours < other for ours, other in zip(esmm["calibration"], clicked_only["calibration"], strict=True))
    assert mean(esmm["log_loss"]) < mean(clicked_only["log_loss"])
    assert np.min(esmm["log_loss"]) > log_loss(true, true)
