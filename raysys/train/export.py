"""From a run to a bundle: the weights of its kept checkpoint in the plain model, with all that serving needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raysys.bundle import FP32, write_bundle
from raysys.data.transforms import Transforms
from raysys.errors import UserError
from raysys.models.quantized_tables import quantize_tables
from raysys.schema import FeatureSchema
from raysys.train.checkpoint import list_checkpoints
from raysys.train.job import Job
from raysys.train.record import read_record
from raysys.train.state import load_weights


def open_run(folder: Path, checkpoint: Path | None = None) -> tuple[Job, dict[str, Any]]:
    """The job of a run that has ended, with the checkpoint to use as `resume`, and its record.

    checkpoint: None takes the one that the record names as best, or else the newest.
    """
    folder = folder.resolve()
    record = read_record(folder)
    if record is None:
        raise UserError(f"{folder}: no run (run.json is missing)", "raysys runs lists them")
    newest = list_checkpoints(folder / "checkpoints")
    kept = folder / "checkpoints" / Path(record["checkpoint"]).name if record.get("checkpoint") else None
    path = (checkpoint.resolve() if checkpoint else None) or kept or (newest[-1] if newest else None)
    if path is None:
        raise UserError(f"{folder}: the run has no checkpoint", "let it train until one is written")
    schema, transforms = FeatureSchema.load(folder / "schema.yaml"), Transforms.load(folder / "transforms")
    return Job(record["config"], schema, transforms, folder, record["config"]["data"]["folder"], path), record


def export_run(
    folder: Path,
    checkpoint: Path | None = None,
    output: Path | None = None,
    quantize: str | None = None,
    artifacts: Path | None = None,
) -> Path:
    """Write the bundle of a run to `output` (default: `bundle` in its folder) and return its path.

    quantize: int8 or int4 rows of the embedding tables; None keeps them in fp32. artifacts: a folder of files that go along.
    """
    job, record = open_run(folder, checkpoint)
    step = job.train_step("cpu")
    assert job.resume is not None
    load_weights(job.resume, step)
    if quantize is not None:
        quantize_tables(step.model, quantize)
    return write_bundle(
        output or folder / "bundle",
        model_config=job.config["model"] | {"seed": job.seed},
        schema=job.schema,
        transforms=job.transforms,
        weights=step.model.state_dict(),
        calibration=record.get("calibration") or {},
        metrics=record.get("metrics") or {},
        tables=quantize or FP32,
        artifacts=artifacts,
    )
