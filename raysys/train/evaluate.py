"""Evaluation of one split: metrics that are exact over the ranks, predictions written where they are computed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from raysys.models.retrieval.base import RetrievalModel
from raysys.nn.calibration import Calibrator
from raysys.nn.collectives import on_first_rank, rank, world_size
from raysys.train.job import Job
from raysys.train.metrics import Evaluator
from raysys.train.recall import CatalogueEvaluator
from raysys.train.retrieval import count_baselines
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
    baselines: bool = False,
) -> Evaluation:
    """Score a split with a model in evaluation mode (collective).

    calibrators: fitted maps by task, applied to the probabilities. fit_calibration: fit maps on this split as the settings
    say. predictions: a folder that gets one Parquet file a rank with example id, label, probability and weight. teachers:
    the columns of their probabilities by task. baselines: rank what counting alone retrieves beside a retrieval model.
    """
    started = time.monotonic()
    settings = job.train
    if isinstance(model, RetrievalModel):
        return evaluate_retrieval(model, job, split, device, predictions, baselines)
    evaluator = Evaluator(job.schema, settings.slices, calibration=calibrators, teachers=teachers)
    reader = job.reader(job.log(split), training=False, rank=rank(), world_size=world_size())
    for batch, _ in reader.epoch():
        evaluator.update(model(batch.to(device, non_blocking=True)).logits, batch)
    report = evaluator.compute()
    if predictions is not None:
        _write_predictions(evaluator.predictions(), predictions)
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


@torch.no_grad()
def evaluate_retrieval(
    model: RetrievalModel, job: Job, split: str, device: torch.device, predictions: Path | None, baselines: bool
) -> Evaluation:
    """Rank the items of a split's positive rows among the whole catalogue (collective); arguments as in `evaluate`."""
    started = time.monotonic()
    settings, retrieval = job.train, job.train.retrieval
    assert retrieval is not None
    items = job.items()
    evaluator = CatalogueEvaluator(
        model,
        items,
        job.schema,
        retrieval.at,
        retrieval.exclude,
        device,
        settings.evaluation_batch_size,
        count_baselines(job, items) if baselines and retrieval.exclude is not None else None,
    )
    reader = job.reader(job.log(split), training=False, rank=rank(), world_size=world_size())
    for batch, _ in reader.epoch():
        evaluator.update(batch.to(device, non_blocking=True))
    report = evaluator.compute()
    if predictions is not None:
        _write_predictions(evaluator.predictions(), predictions)
    return Evaluation(split, time.monotonic() - started, report["tasks"], report["slices"], {}, {}, {})


def _write_predictions(rows: pa.Table, folder: Path) -> None:
    def make_room() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    on_first_rank(make_room)
    pq.write_table(rows, folder / f"part-{rank():05d}.parquet")
