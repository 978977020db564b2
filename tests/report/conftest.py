"""A made-up run with the shape of a real one: two tasks, two ranks, three epochs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysys.report.events import EventWriter

BEGIN = 1_700_000_000.0
CONFIG = {
    "model": {
        "_target_": "raysys.models.ranking.dhen.DHEN",
        "embedding_dim": 16,
        "layers": 3,
        "modules": ["dot", "dcn"],
    },
    "data": {"path": "data/movielens-100k", "batch_size": 1024, "shards": 12},
    "train": {
        "epochs": 3,
        "seed": 0,
        "optimizers": {"sparse": {"name": "row_wise_adagrad", "lr": 0.02}, "dense": {"lr": 0.001}},
    },
}


def step_event(step: int, total: int = 600, rng: np.random.Generator | None = None) -> dict:
    noise = rng.normal() if rng else 0.0
    gone = step / total
    ne = 0.79 + 0.21 * math.exp(-5 * gone)
    return {
        "event": "step", "time": BEGIN + 10 + step * 0.1, "step": step, "epoch": step * 3 // (total + 1), "rows": step * 1024,
        "rows_per_second": 10_240 + 300 * noise, "loss": 0.55 + 0.35 * math.exp(-6 * gone) + 0.02 * noise,
        "parts": {"like": 0.5 + 0.2 * math.exp(-6 * gone) + 0.01 * noise, "finish": 0.05 + 0.15 * math.exp(-6 * gone)},
        "metrics": {"like": {"ne": ne - 0.01, "auc": 0.5 + 0.3 * (1 - math.exp(-5 * gone)), "calibration": 1 + 0.05 * noise},
                    "finish": {"ne": ne + 0.05, "auc": 0.5 + 0.2 * (1 - math.exp(-5 * gone)), "calibration": None}},
        "learning_rates": {"dense": 0.001 * min(1, gone * 10), "sparse": 0.02},
        "breakdown": {"read": 0.004, "copy": 0.001, "forward": 0.03, "backward": 0.045, "optimizer": 0.012, "other": 0.002},
        "eta_seconds": (total - step) * 0.1,
    }  # fmt: skip


def evaluation_event(step: int, split: str, total: int = 600) -> dict:
    ne = 0.795 + 0.2 * math.exp(-5 * step / total)
    like = {"ne": ne, "auc": 0.7905 - 0.2 * math.exp(-5 * step / total), "gauc": 0.71, "log_loss": 0.549, "calibration": 1.012, "ece": 0.011,
            "rows": 10000, "base_rate": 0.5537}  # fmt: skip
    finish = {**like, "ne": ne + 0.06, "auc": like["auc"] - 0.05, "base_rate": 0.12, "gauc": None}
    points = [
        {"prediction": p, "label": min(1.0, p * 1.03), "weight": 500} for p in np.linspace(0.05, 0.93, 20).tolist()
    ]
    slices = {"genre": {name: {"like": {**like, "ne": ne + shift, "rows": 4000 // (i + 1)}, "finish": {**finish, "ne": ne - shift}}
                        for i, (name, shift) in enumerate([("Drama", -0.012), ("Comedy", 0.02), ("Film-Noir", 0.05), ("Sci-Fi", -0.03)])}}  # fmt: skip
    return {"event": "evaluation", "time": BEGIN + 10.05 + step * 0.1, "step": step, "epoch": step * 3 // (total + 1), "split": split, "seconds": 1.4,
            "tasks": {"like": like, "finish": finish}, "slices": slices, "calibration_curve": {"like": points, "finish": points[:8]}}  # fmt: skip


def start_events(total: int = 600) -> list[dict]:
    tables = [
        ("user_id", 944, 32, "row_wise", [0, 1]),
        ("item_id", 1683, 32, "column_wise", [0, 1]),
        ("genre", 20, 16, "table_wise", [1]),
    ]
    return [
        {"event": "run_started", "time": BEGIN, "run_id": "dhen-movielens", "config": CONFIG, "schema": {}, "world_size": 2, "device": "cpu",
         "parameters": {"dense": 184_321, "sparse": 84_384}, "bytes_per_rank": [401_000, 398_000], "flops_per_row": 1_250_000.0,
         "total_steps": total, "rows_per_epoch": 80_000, "tasks": ["like", "finish"]},
        {"event": "plan", "time": BEGIN + 1, "tables": [
            {"table": name, "rows": rows, "width": width, "sharding": how, "kernel": "fused", "ranks": ranks,
             "bytes_per_rank": [rows * width * 4 // len(ranks)] * len(ranks)} for name, rows, width, how, ranks in tables]},
    ]  # fmt: skip


def health_event(step: int) -> dict:
    hot = [
        {"id": 50, "value": "Star Wars (1977)", "share": 0.0058},
        {"id": 258, "value": "Contact (1997)", "share": 0.0051},
        {"id": 100, "value": None, "share": 0.005},
    ]
    tables = {"user_id": {"rows": 944, "norm_mean": 0.1 + step / 1000, "norm_p99": 1.4, "never_trained_share": 0.001, "hot_ids": hot[2:]},
              "item_id": {"rows": 1683, "norm_mean": 0.1 + step / 2000, "norm_p99": 1.9, "never_trained_share": 0.143, "hot_ids": hot}}  # fmt: skip
    return {"event": "embedding_health", "time": BEGIN + 10.06 + step * 0.1, "step": step, "tables": tables}


def run_events(total: int = 600) -> list[dict]:
    rng = np.random.default_rng(0)
    events = start_events(total)
    for step in range(10, total + 1, 10):
        events.append(step_event(step, total, rng))
        if step % 100 == 0:
            events += [evaluation_event(step, "valid", total), health_event(step)]
            path = f"checkpoints/step_{step:08d}"
            events.append(
                {
                    "event": "checkpoint",
                    "time": BEGIN + 10.07 + step * 0.1,
                    "step": step,
                    "path": path,
                    "bytes": 1_234_567,
                    "seconds": 0.2,
                    "reason": "every 100 steps",
                }
            )
    events.append(evaluation_event(total, "test", total))
    end = events[-1]["time"] + 1
    return [
        *events,
        {
            "event": "run_finished",
            "time": end,
            "status": "finished",
            "step": total,
            "seconds": end - BEGIN,
            "message": "",
        },
    ]


def run_record(total: int = 600) -> dict:
    tests = {split: evaluation_event(total, split, total)["tasks"] for split in ("valid", "test")}
    return {
        "run_id": "dhen-movielens", "status": "finished", "started": BEGIN, "finished": BEGIN + 80, "config": CONFIG, "config_hash": "0f3a9c1e77aa2b10",
        "schema_hash": "a94a8fe5ccb19ba6", "versions": {"raysys": "0.1.0", "torch": "2.13.0+cpu", "torchrec": "1.8.0"},
        "machine": {"cpus": 2, "memory_bytes": 25_769_803_776, "gpu": None}, "seed": 0, "world_size": 2, "device": "cpu",
        "parameters": {"dense": 184_321, "sparse": 84_384}, "bytes_per_rank": [401_000, 398_000], "flops_per_row": 1_250_000.0, "metrics": tests,
        "best": {"step": total - 100, "value": 0.7964, "stale": 1}, "rows_per_second": 10_187.0, "peak_memory_bytes": 912_000_000,
        "step_breakdown": {"read": 0.004, "copy": 0.001, "forward": 0.031, "backward": 0.044, "optimizer": 0.012, "other": 0.002},
        "paths": {"bundle": "runs/dhen-movielens/bundle"},
        "intervals": {"test": {"like": {"ne": [0.7891, 0.8032], "auc": [0.7842, 0.7951]}}},
    }  # fmt: skip


def write_predictions(
    folder: Path, split: str = "test", seed: int = 1, skill: float = 0.9, ids: range = range(2000)
) -> None:
    """The same labels for every seed, rows in another order; predictions with more or less of the truth in them.

    Two files in a folder, as two ranks write them; every tenth row has no label.
    """
    truth = 1 / (1 + np.exp(-np.random.default_rng(99).normal(size=ids.stop)[ids.start :]))
    labels = (np.random.default_rng(98).random(ids.stop)[ids.start :] < truth).astype(np.float32)
    rng = np.random.default_rng(seed)
    logit = skill * np.log(truth / (1 - truth)) + (1 - skill) * rng.normal(size=len(ids))
    order = rng.permutation(len(ids))
    weight = (np.arange(ids.start, ids.stop) % 10 > 0).astype(np.float32)
    columns = {
        "example_id": pa.array(np.arange(ids.start, ids.stop)[order]),
        "like_label": pa.array(labels[order], mask=weight[order] == 0),
        "like_probability": pa.array((1 / (1 + np.exp(-logit)))[order]),
        "like_weight": pa.array(weight[order]),
    }
    path = folder / "predictions" / f"{split}.parquet"
    path.mkdir(parents=True)
    for rank, rows in enumerate((slice(0, 700), slice(700, None))):
        pq.write_table(
            pa.table({name: column[rows] for name, column in columns.items()}), path / f"part-{rank:05d}.parquet"
        )


def write_run(folder: Path, events: list[dict], record: dict | None) -> Path:
    folder.mkdir(parents=True)
    writer = EventWriter(folder / "events.jsonl")
    for event in events:
        writer.write(event)
    if record is not None:
        (folder / "run.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def events() -> list[dict]:
    """All events of a run that finished."""
    return run_events()


@pytest.fixture
def record() -> dict:
    """The run.json of a run that finished."""
    return run_record()


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A run's folder from a name, its events and its run.json (None: there is none)."""
    return lambda name, events, record=None: write_run(tmp_path / "runs" / name, events, record)


@pytest.fixture
def make_predictions() -> Callable[..., None]:
    """Writes predictions/<split>.parquet into a run's folder."""
    return write_predictions


@pytest.fixture
def run(make_run: Callable[..., Path], events: list[dict], record: dict) -> Path:
    """The folder of a complete run, predictions of the test split included."""
    folder = make_run("dhen-movielens", events, record)
    write_predictions(folder)
    return folder
