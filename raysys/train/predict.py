"""Score a log with the weights of a run: every worker its share of the rows, one Parquet file each, in bounded memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torchrec.distributed.types import ShardingPlan

from raysys.bundle import to_predictions
from raysys.data.batch import Batch
from raysys.data.log import ParquetLog
from raysys.nn.calibration import Calibrator, calibration_from_dict
from raysys.nn.collectives import communication_device, global_sum, rank, world_size
from raysys.train.job import Job
from raysys.train.launch import Worker
from raysys.train.sharding import shard, unwrap
from raysys.train.state import load_weights


@torch.no_grad()
def predict_worker(worker: Worker, plan: ShardingPlan, log_path: str, output: Path, calibration: dict[str, Any]) -> int:
    """Score this rank's rows of a log into `output/part-<rank>.parquet` and return the rows of all ranks (collective).

    Columns: example_id, and per task `<task>_probability` (`<task>_prediction` of a regression task).
    """
    job, device = worker.job, worker.device
    model = shard(job.train_step("meta"), plan, device, job.train.optimizers, seed=job.seed)
    assert job.resume is not None
    load_weights(job.resume, model)
    ranker, calibrators = unwrap(model).model.eval(), calibration_from_dict(calibration)
    log = ParquetLog(log_path, job.schema, labels=False)
    reader = job.reader(log, training=False, rank=rank(), world_size=world_size(), labels=False)
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
