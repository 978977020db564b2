"""The driver of a run: everything is checked before a worker starts, and the record is true at every moment."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raysys.config import Config, validate
from raysys.data.filesystem import read_text
from raysys.data.log import ParquetLog, split_path
from raysys.data.prepare.dataset import read_prepared
from raysys.data.transforms import Transforms
from raysys.errors import UserError
from raysys.models.flops import flops_per_row
from raysys.plain import config_value
from raysys.schema import FeatureSchema
from raysys.train.best import BestSoFar
from raysys.train.checkpoint import list_checkpoints, verify_checkpoint
from raysys.train.conclude import Outcome, train_worker
from raysys.train.intervals import metric_interval
from raysys.train.job import Job, absolute, device_type
from raysys.train.launch import launch
from raysys.train.lock import check_free, held, is_held
from raysys.train.loop import total_steps
from raysys.train.optimizers import clip_groups, dense_parameters
from raysys.train.plan import TablePlan, plan_table, plan_tables
from raysys.train.record import RECORD, RunRecord, config_changes, config_hash, read_record
from raysys.train.retrieval import check_retrieval, retrieval_intervals, retrieval_schema, retrieval_task
from raysys.train.settings import Settings
from raysys.train.size import parameter_counts
from raysys.train.slices import check_slices

Listener = Callable[[dict[str, Any]], None]
_NAMED_CHANGES = 3


@dataclass(frozen=True)
class Prepared:
    """A run that can start: its data is readable, its model builds, its tables fit."""

    job: Job
    plan: TablePlan
    facts: dict[str, Any]
    """The fields of the run_started event."""


def prepare(config: Config) -> Prepared:
    """Check data, config, model and plan on the driver; nothing is written yet. Raises UserError."""
    given = validate(Settings, config)
    folder, resume = _run_folder(config, given)
    data = absolute(given.data.folder)
    schema = FeatureSchema.load(f"{data.rstrip('/')}/schema.yaml", read_text)
    if given.train.retrieval is not None:
        schema = retrieval_schema(schema, given.train.retrieval)
    log = ParquetLog(split_path(data, "train"), schema)
    job = Job(config, schema, _transforms(log, given.seed, folder, resume), folder, data, resume)
    settings, trainer = job.train, job.trainer
    world_size = 1 if trainer.kind == "local" else trainer.workers
    device = device_type(trainer)
    reader = job.reader(log, training=True, rank=0, world_size=world_size)
    if settings.early_stopping is not None and not job.has_split("valid"):
        raise UserError(
            f"train.early_stopping needs a validation split, and {data} has none",
            "add valid.parquet, or set train.early_stopping=null",
        )
    if settings.calibration != "none" and not job.has_split("valid"):
        raise UserError(
            f"train.calibration is fitted on a validation split, and {data} has none",
            "add valid.parquet, or set train.calibration=none",
        )
    if job.has_split("valid"):
        job.log("valid")
    BestSoFar(settings.early_stopping, schema, settings.retrieval)
    check_slices(schema, settings.slices)
    step = job.train_step("meta")
    check_retrieval(step.model, settings)
    clip_groups(dense_parameters(step), settings.optimizers.clip)
    plan = plan_tables(step, world_size, device, reader.local_batch_size, settings.sharding, settings.optimizers)
    facts = {
        "run_id": folder.name,
        "config": config,
        "schema": schema.to_dict(),
        "world_size": world_size,
        "device": device,
        "tasks": [retrieval_task(schema, settings.retrieval)] if settings.retrieval else list(schema.tasks),
        "parameters": parameter_counts(step),
        "bytes_per_rank": plan.bytes_per_rank(),
        "flops_per_row": flops_per_row(job.build_model, schema),
        "steps_per_epoch": reader.steps_per_epoch,
        "rows_per_epoch": log.num_rows,
        "total_steps": total_steps(reader.steps_per_epoch, settings.epochs, settings.max_steps),
    }
    return Prepared(job, plan, facts)


def fit(prepared: Prepared, listeners: Sequence[Listener]) -> Outcome:
    """Train to the end. Listeners get every event in order; `run.json` says how it went, also when it went wrong.

    Raises UserError, with nothing changed, where another process is training this run.
    """
    prepared.job.folder.mkdir(parents=True, exist_ok=True)
    with held(prepared.job.folder):
        return _fit(prepared, listeners)


def _fit(prepared: Prepared, listeners: Sequence[Listener]) -> Outcome:
    job, facts = prepared.job, prepared.facts
    job.transforms.save(job.folder / "transforms")
    job.schema.save(job.folder / "schema.yaml")
    keys = ("world_size", "device", "parameters", "bytes_per_rank", "flops_per_row")
    record = RunRecord(job, **{key: facts[key] for key in keys})

    def emit(event: dict[str, Any]) -> None:
        for listener in listeners:
            listener({"time": time.time(), **event})

    emit({"event": "run_started", **facts})
    emit({"event": "plan", "tables": plan_table(prepared.plan)})
    started = time.monotonic()
    try:
        outcome = launch(job, partial(train_worker, plan=prepared.plan), emit)
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        message = error.message if isinstance(error, UserError) else str(error) or type(error).__name__
        record.update(status=status, finished=time.time(), message=message)
        emit({"event": "run_finished", "status": status, "seconds": time.monotonic() - started, "message": message})
        raise
    record.update(finished=time.time(), **vars(outcome), intervals=_intervals(job), bayes=_bayes(job))
    finished = {"status": outcome.status, "step": outcome.step, "seconds": time.monotonic() - started, "message": ""}
    emit({"event": "run_finished", **finished})
    return outcome


def _run_folder(config: Config, given: Settings) -> tuple[Path, Path | None]:
    """The folder of this run, and the checkpoint of another run that it starts from.

    `resume: auto` takes up the run `run_id`, which must have the same config, or else the newest unfinished run of the same
    config that no process is training; `none` starts a run; a path starts one that continues from that checkpoint.
    """
    runs, resume, run_id = Path(given.runs_folder).resolve(), given.resume, given.run_id
    if resume == "auto" and run_id is None:
        unfinished = [path for path in runs.glob("*/run.json") if _takes_up(path.parent, config)]
        if unfinished:
            return max(unfinished, key=lambda path: path.stat().st_mtime).parent, None
    folder = runs / run_id if run_id else _new_folder(runs, given.name)
    if resume != "auto" and (folder / RECORD).exists():
        raise UserError(f"run {folder} exists already", "give it another run_id, or continue it with resume=auto")
    if resume == "auto":
        check_free(folder)
        _check_same_config(folder, config)
    if resume in ("auto", "none"):
        return folder, None
    checkpoint = Path(resume).resolve()
    if not checkpoint.is_dir():
        raise UserError(
            f"resume is {resume!r}, and there is no such checkpoint", "auto, none or the path of a checkpoint"
        )
    verify_checkpoint(checkpoint)
    return folder, checkpoint


def _new_folder(runs: Path, name: str) -> Path:
    """A folder that no other run has, named by the time."""
    folder = runs / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    others = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
    return folder if not folder.exists() else next(other for other in others if not other.exists())


def _takes_up(folder: Path, config: Config) -> bool:
    record = read_record(folder)
    return (
        record is not None
        and record["config_hash"] == config_hash(config)
        and record["status"] in ("running", "interrupted", "failed")
        and not is_held(folder)
    )


def _check_same_config(folder: Path, config: Config) -> None:
    """A run goes on as it began: its record and its events could not say otherwise."""
    record = read_record(folder)
    changes = config_changes(record["config"], config) if record else []
    if not changes:
        return
    named = [f"{change.key} {config_value(change.a)} → {config_value(change.b)}" for change in changes[:_NAMED_CHANGES]]
    more = [f"{len(changes) - _NAMED_CHANGES} more"] if len(changes) > _NAMED_CHANGES else []
    start = "".join(f" resume={path}" for path in list_checkpoints(folder / "checkpoints")[-1:])
    raise UserError(
        f"run {folder} has another config: {', '.join(named + more)}",
        f"give the old values, or start a new run with the new ones: another run_id{start and ' and' + start}",
    )


def _transforms(log: ParquetLog, seed: int, folder: Path, resume: Path | None) -> Transforms:
    """Those of the run or checkpoint that is taken up, or else fitted on the training split."""
    if list_checkpoints(folder / "checkpoints"):
        return Transforms.load(folder / "transforms")
    if resume is not None:
        return Transforms.load(resume / "transforms")
    return Transforms.fit(log.schema, log, seed=seed)


def _intervals(job: Job) -> dict[str, dict[str, dict[str, tuple[float, float]]]]:
    """95% intervals of AUC, NE and log-loss by split and binary task, from the predictions that the workers wrote."""
    intervals: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}
    for path in sorted((job.folder / "predictions").glob("*.parquet")):
        table = pq.read_table(path)
        if job.train.retrieval is not None:
            intervals[path.stem] = retrieval_intervals(table, job.train.retrieval.at)
            continue
        intervals[path.stem] = {
            label.name: _task_intervals(table, label.name) for label in job.schema.labels if label.kind == "binary"
        }
    return intervals


def _task_intervals(table: pa.Table, task: str) -> dict[str, tuple[float, float]]:
    rows = table.filter(pc.field(f"{task}_weight") > 0)
    label, probability, weight = (rows[f"{task}_{name}"].to_numpy() for name in ("label", "probability", "weight"))
    return {metric: metric_interval(metric, label, probability, weight)[1:] for metric in ("auc", "ne", "log_loss")}


def _bayes(job: Job) -> dict[str, Any]:
    """The metrics of the true probabilities by split and task, where the data set is synthetic."""
    return (read_prepared(job.data) or {}).get("bayes", {})
