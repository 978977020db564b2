"""Evaluation of one split: metrics that are exact over the ranks, predictions written where they are computed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import nn

from raysys.nn.calibration import Calibrator
from raysys.nn.collectives import on_first_rank, rank, world_size
from raysys.train.job import Job
from raysys.train.metrics import Evaluator
from raysys.train.slices import named_slices


@dataclass(frozen=True)
class Evaluation:
    """The metrics of one split, the same on every rank."""

    split: str
    seconds: float
    tasks: dict[str, dict[str, float]]
    slices: dict[str, Any]
    calibration_curve: dict[str, list[dict[str, float]]]
    selection: dict[str, dict[str, list[dict[str, Any]]]]
    """Calibration by depth of selection, of tasks with a teacher."""
    calibrators: dict[str, Calibrator]
    """Fitted on this split where that was asked for."""

    def event(self) -> dict[str, Any]:
        """The fields of an evaluation event."""
        return {key: value for key, value in vars(self).items() if key != "calibrators"}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    job: Job,
    split: str,
    device: torch.device,
    calibrators: Mapping[str, Calibrator] | None = None,
    fit_calibration: bool = False,
    predictions: Path | None = None,
    teachers: Mapping[str, str] | None = None,
) -> Evaluation:
    """Score a split with a model in evaluation mode (collective).

    calibrators: fitted maps by task, applied to the probabilities. fit_calibration: fit maps on this split as the settings
    say. predictions: a folder that gets one Parquet file a rank with example id, label, probability and weight. teachers:
    the columns of their probabilities by task.
    """
    started = time.monotonic()
    settings = job.train
    evaluator = Evaluator(job.schema, settings.slices, calibration=calibrators, teachers=teachers)
    reader = job.reader(job.log(split), training=False, rank=rank(), world_size=world_size())
    for batch, _ in reader.epoch():
        evaluator.update(model(batch.to(device, non_blocking=True)).logits, batch)
    report = evaluator.compute()
    if predictions is not None:
        _write_predictions(evaluator, predictions)
    fitted = (
        evaluator.fit_calibration(settings.calibration) if fit_calibration and settings.calibration != "none" else {}
    )
    return Evaluation(
        split=split,
        seconds=time.monotonic() - started,
        tasks=report["tasks"],
        slices=named_slices(report["slices"], job.schema, job.transforms.vocabulary),
        calibration_curve=report["calibration_curve"],
        selection=report["selection"],
        calibrators=fitted,
    )


def _write_predictions(evaluator: Evaluator, folder: Path) -> None:
    def make_room() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    on_first_rank(make_room)
    pq.write_table(evaluator.predictions(), folder / f"part-{rank():05d}.parquet")
