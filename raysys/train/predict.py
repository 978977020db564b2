"""Score a log with the weights of a run: every worker its share of the rows, one Parquet file each, in bounded memory."""

from __future__ import annotations

import dataclasses
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torchrec.distributed.types import ShardingPlan

from raysys.bundle import NO_PROBABILITIES, to_predictions
from raysys.config import Config
from raysys.data.batch import Batch
from raysys.data.log import ParquetLog
from raysys.data.roles import check_column, roles
from raysys.data.row_groups import RowGroupWriter
from raysys.data.source import is_text, open_source, read_batches
from raysys.errors import UserError
from raysys.nn.calibration import Calibrator, calibration_from_dict
from raysys.nn.collectives import communication_device, global_sum, rank, world_size
from raysys.train.export import open_run
from raysys.train.job import Job, absolute, device_type
from raysys.train.launch import Worker, launch
from raysys.train.optimizers import OptimizerSettings
from raysys.train.plan import ShardingSettings, TablePlan, plan_tables
from raysys.train.sharding import shard, unwrap
from raysys.train.sparse_optimizers import SparseOptimizer
from raysys.train.state import load_weights

_NO_STATE = OptimizerSettings(sparse=SparseOptimizer(name="sgd"))
"""Nothing is trained here, so no table needs an optimiser's state, nor a device that has the run's optimiser."""


def predict(run: Path, log_path: str, output: Path, trainer: Config, checkpoint: Path | None = None) -> int:
    """Score the log at a path or URI into the folder `output`, which appears when all is done, and return its rows.

    The log is Parquet, CSV or TSV. trainer: where the workers run, as the `trainer` group of a training config. checkpoint:
    None takes the run's best one. Columns of the output: example_id (the row's number, from 0, where the log has no such
    column), and per task `<task>_probability` (`<task>_prediction` of a regression task).
    """
    output, log_path = output.resolve(), absolute(log_path)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is there already", "name a folder that does not exist")
    job, record = open_run(run, checkpoint)
    if job.train.retrieval is not None:
        raise UserError(f"{run} is a retrieval model, whose scores are no probabilities", NO_PROBABILITIES)
    writing = output.with_name(f"{output.name}.writing")
    job = dataclasses.replace(job, config=job.config | {"trainer": trainer}, folder=writing)
    shutil.rmtree(writing, ignore_errors=True)
    try:
        if is_text(log_path):
            log_path = str(_as_parquet(job, log_path, writing))
        work = partial(
            predict_worker,
            plan=_plan(job, log_path, record["device"]),
            log_path=log_path,
            output=writing / "scores",
            calibration=record.get("calibration") or {},
        )
        rows = launch(job, work, emit=lambda event: None, can_stop=False)
        if output.exists():
            output.rmdir()
        (writing / "scores").rename(output)
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return rows


def _as_parquet(job: Job, log_path: str, folder: Path) -> Path:
    """A copy of a CSV log, made in bounded memory where all workers can read it; ids have the types that training saw."""
    texts = [name for name, kind in job.transforms.types.items() if kind == "string"]
    data = open_source(log_path, dict.fromkeys(texts, pa.string()))
    found = [role for role in roles(job.schema, labels=False) if not role.optional or role.column in data.schema.names]
    for role in found:
        check_column(role, data.schema, log_path)
    folder.mkdir(parents=True)
    copy, rows = folder / f"{Path(log_path).name}.parquet", 0
    with RowGroupWriter(copy) as writer:
        for batch in read_batches(data, log_path, list(dict.fromkeys(role.column for role in found))):
            writer.write(batch)
            rows += len(batch)
    if not rows:
        raise UserError(f"{log_path}: no rows", "a log needs at least one row")
    return copy


def _plan(job: Job, log_path: str, trained_on: str) -> TablePlan:
    """Checks the log, and places the tables as the run did, or anew on another kind of device."""
    log = ParquetLog(log_path, job.schema, labels=False)
    workers = 1 if job.trainer.kind == "local" else job.trainer.workers
    reader = job.reader(log, training=False, rank=0, world_size=workers, labels=False)
    device = device_type(job.trainer)
    sharding = job.train.sharding if device == trained_on else ShardingSettings()
    return plan_tables(job.train_step("meta"), workers, device, reader.local_batch_size, sharding, _NO_STATE)


@torch.no_grad()
def predict_worker(worker: Worker, plan: ShardingPlan, log_path: str, output: Path, calibration: dict[str, Any]) -> int:
    """Score this rank's rows of a log into `output/part-<rank>.parquet` and return the rows of all ranks (collective)."""
    job, device = worker.job, worker.device
    model = shard(job.train_step("meta"), plan, device, _NO_STATE, seed=job.seed)
    assert job.resume is not None
    load_weights(job.resume, model)
    ranker, calibrators = unwrap(model).model.eval(), calibration_from_dict(calibration)
    log = ParquetLog(log_path, job.schema, labels=False)
    reader = job.reader(log, training=False, rank=rank(), world_size=world_size(), labels=False)
    output.mkdir(parents=True, exist_ok=True)
    rows = 0
    with pq.ParquetWriter(output / f"part-{rank():05d}.parquet", _schema(job)) as writer:
        for batch, _ in reader.epoch():
            logits = ranker(batch.to(device, non_blocking=True)).logits.cpu()
            table = _table(job, batch, logits, calibrators)
            writer.write_table(table)
            rows += table.num_rows
    return int(global_sum(torch.tensor(rows, device=communication_device())))


def _schema(job: Job) -> pa.Schema:
    names = {"binary": "probability", "regression": "prediction"}
    columns = [(f"{label.name}_{names[label.kind]}", pa.float64()) for label in job.schema.labels]
    return pa.schema([("example_id", pa.int64()), *columns])


def _table(job: Job, batch: Batch, logits: torch.Tensor, calibrators: dict[str, Calibrator]) -> pa.Table:
    real = batch.example_id >= 0
    predictions = to_predictions(logits[real], job.schema, calibrators)
    columns = [batch.example_id[real].numpy(), *predictions.T.numpy()]
    return pa.table(columns, schema=_schema(job))
