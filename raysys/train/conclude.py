"""The end of a run: metrics of the kept weights on every split, the fitted calibration, the health of the tables."""

from __future__ import annotations

import resource
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torchrec.distributed.types import ShardingPlan

from raysys.nn.calibration import Calibrator, calibration_to_dict
from raysys.nn.collectives import communication_device, global_max, rank
from raysys.train.checkpoint import checkpoint_path, verify_checkpoint
from raysys.train.health import embedding_health, hot_ids
from raysys.train.launch import Worker
from raysys.train.loop import TrainLoop


@dataclass(frozen=True)
class Outcome:
    """How a run ended, the same on every rank."""

    status: str
    step: int
    checkpoint: Path
    metrics: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    calibration: dict[str, dict[str, Any]] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    rows_per_second: float | None = None
    step_breakdown: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0


def train_worker(worker: Worker, plan: ShardingPlan) -> Outcome:
    """What every rank of a training run does, under any launcher."""
    loop = TrainLoop(worker, plan)
    return conclude(loop, loop.run())


def conclude(loop: TrainLoop, status: str) -> Outcome:
    """Take the best weights (the last ones without early stopping) and evaluate them; an interrupted run is not evaluated."""
    checkpoints = loop.job.checkpoints
    path = loop.best.path(checkpoints) or checkpoint_path(checkpoints, loop.step)
    outcome: dict[str, Any] = {"status": status, "step": loop.step, "checkpoint": path, "best": loop.best.state()}
    if status != "interrupted":
        if path != checkpoint_path(checkpoints, loop.step):
            loop.load(path, verify_checkpoint(path))  # events from here on are of that step
        metrics, calibrators = _evaluate(loop)
        outcome |= {"metrics": metrics, "calibration": calibration_to_dict(calibrators)}
        health = embedding_health(loop.model, loop.job)
        if rank() == 0:
            hot = hot_ids(loop.job)
            tables = {key: {**values, "hot_ids": hot.get(key, [])} for key, values in health.items()}
            loop.emit({"event": "embedding_health", "step": loop.step, "tables": tables})
    return Outcome(**outcome, **loop.summary(), peak_memory_bytes=peak_memory_bytes(loop.device))


def _evaluate(loop: TrainLoop) -> tuple[dict[str, Any], dict[str, Calibrator]]:
    """Metrics by split. The calibration is fitted on the validation split and applied to the test split."""
    metrics: dict[str, Any] = {}
    calibrators: dict[str, Calibrator] = {}
    if loop.job.has_split("valid"):
        path = loop.job.folder / "predictions" / "valid.parquet"
        evaluation = loop.evaluate("valid", predictions=path, fit_calibration=True)
        metrics["valid"], calibrators = evaluation.tasks, evaluation.calibrators
    if loop.job.has_split("test"):
        path = loop.job.folder / "predictions" / "test.parquet"
        metrics["test"] = loop.evaluate("test", calibrators=calibrators, predictions=path, baselines=True).tasks
    return metrics, calibrators


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that the process of any rank has held (collective): on the GPU where it computes there, else resident."""
    if device.type == "cuda":
        own = torch.cuda.max_memory_allocated(device)
    else:
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(global_max(torch.tensor(own, device=communication_device())))
