"""The exported artefact: one model for serving, written, verified and loaded without a pickle.

bundle/
  model.safetensors       all weights of the plain model (never the objective's); its metadata says how tables are stored
  config.json             the `model` node: its `_target_` names the class, resolved under allowed prefixes only
  schema.yaml             what a request's columns mean
  transforms/             vocabularies and normalisers
  calibration.json        the fitted map by task, empty where none was asked for
  metrics.json            metrics by split of the run that it comes from
  artifacts/              whatever else serving needs: an index, codes (absent where there is none)
  manifest.json           sha256 of every file above, written last
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from raysys.config import Config, instantiate
from raysys.data.transforms import Transforms
from raysys.errors import UserError, nearest
from raysys.hashed_folder import files_of, find_damage, hash_files, read_json, read_manifest, write_manifest
from raysys.models.quantized_tables import quantize_tables
from raysys.models.retrieval.base import RetrievalModel
from raysys.nn.calibration import Calibrator, calibration_from_dict, correct_sampling
from raysys.schema import FeatureSchema
from raysys.strict_json import to_plain

FORMAT_VERSION = 1
ALLOWED_TARGETS = ("raysys.",)
NO_PROBABILITIES = "encode_users and encode_items of its bundle's model give the vectors that an index is searched with"
ARTIFACTS = "artifacts"
FP32 = "fp32"


@dataclass
class Bundle:
    """A model with all that turns raw rows into probabilities.

    artifacts: the files of `artifacts/` by their path below it; they were verified when the bundle was loaded.
    """

    model: nn.Module
    schema: FeatureSchema
    transforms: Transforms
    calibrators: dict[str, Calibrator]
    metrics: dict[str, Any]
    artifacts: dict[str, Path]

    def artifact(self, name: str) -> Path:
        """Where an artifact is; raises UserError where the bundle has none of this name."""
        if name not in self.artifacts:
            raise UserError(f"the bundle has no artifact {name!r}", nearest(name, self.artifacts))
        return self.artifacts[name]

    @torch.inference_mode()
    def predict(self, rows: pa.Table | pa.RecordBatch | list[dict[str, Any]]) -> Tensor:
        """Predictions [B, T] in float64 for raw rows: calibrated probabilities of binary tasks, values of regression tasks."""
        if isinstance(self.model, RetrievalModel):
            raise UserError(f"{type(self.model).__name__} retrieves: its scores are no probabilities", NO_PROBABILITIES)
        if isinstance(rows, list):
            batch = self.transforms.rows_to_batch(rows)
        else:
            batch = self.transforms.to_batch(rows, labels=False)
        return to_predictions(self.model(batch).logits, self.schema, self.calibrators)


def to_predictions(logits: Tensor, schema: FeatureSchema, calibrators: Mapping[str, Calibrator]) -> Tensor:
    """Logits [B, T] to predictions [B, T] in float64: sigmoid, correction for down-sampled negatives, fitted calibration."""
    columns = []
    for task, label in enumerate(schema.labels):
        value = logits[:, task].double()
        if label.kind == "binary":
            value = correct_sampling(torch.sigmoid(value), label.negative_keep_rate)
            value = calibrators[label.name](value) if label.name in calibrators else value
        columns.append(value)
    return torch.stack(columns, dim=1)


def write_bundle(
    folder: Path,
    model_config: Config,
    schema: FeatureSchema,
    transforms: Transforms,
    weights: Mapping[str, Tensor],
    calibration: Mapping[str, Mapping[str, Any]],
    metrics: Mapping[str, Any],
    tables: str = FP32,
    artifacts: Path | None = None,
) -> Path:
    """Write a bundle beside `folder` and move it there when it is whole; what stood there before is replaced.

    tables: how `weights` has the embedding tables: fp32, or what they were quantised to. artifacts: a folder whose files
    become those of `artifacts/`.
    """
    if artifacts is not None and not artifacts.is_dir():
        raise UserError(f"{artifacts}: no such folder", "artifacts are the files of a folder")
    temporary = folder.with_name(folder.name + ".writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(tensors, temporary / "model.safetensors", {"tables": tables})
    schema.save(temporary / "schema.yaml")
    transforms.save(temporary / "transforms")
    for name, content in (("config", model_config), ("calibration", calibration), ("metrics", metrics)):
        (temporary / f"{name}.json").write_text(json.dumps(to_plain(content), indent=1, sort_keys=True))
    if artifacts is not None:
        shutil.copytree(artifacts, temporary / ARTIFACTS)
    write_manifest(temporary, FORMAT_VERSION, hash_files(temporary, files_of(temporary)))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return folder


def verify_bundle(folder: Path) -> dict[str, str]:
    """Check every file against its hash and return the hashes; raises UserError naming the file that differs."""
    hashes = read_manifest(folder, FORMAT_VERSION)
    for name, damage in find_damage(folder, hashes, hashes).items():
        raise UserError(f"{folder / name} {damage}", "export the bundle again")
    for name in sorted(set(files_of(folder)) - hashes.keys()):
        raise UserError(f"{folder / name} is not in the manifest", "remove it, or export the bundle again")
    return hashes


def load_bundle(folder: str | Path, allowed: Sequence[str] = ALLOWED_TARGETS) -> Bundle:
    """Verify and load a bundle on the CPU.

    allowed: the prefixes under which its model class may stand; add your own package's to load a model of yours.
    """
    folder = Path(folder)
    hashes = verify_bundle(folder)
    schema = FeatureSchema.load(folder / "schema.yaml")
    model = instantiate(read_json(folder / "config.json"), allowed=allowed, schema=schema, device="meta")
    _load_weights(model, folder / "model.safetensors")
    return Bundle(
        model=model.eval(),
        schema=schema,
        transforms=Transforms.load(folder / "transforms"),
        calibrators=calibration_from_dict(read_json(folder / "calibration.json")),
        metrics=read_json(folder / "metrics.json"),
        artifacts={
            name.removeprefix(f"{ARTIFACTS}/"): folder / name for name in hashes if name.startswith(f"{ARTIFACTS}/")
        },
    )


def _load_weights(model: nn.Module, path: Path) -> None:
    """The weights of a file in a model on "meta". They stay in the mapped file until they are used."""
    with safe_open(path, "pt") as file:
        tables = (file.metadata() or {}).get("tables", FP32)
        if tables != FP32:
            quantize_tables(model, tables)
        model.load_state_dict({name: file.get_tensor(name) for name in file.keys()}, assign=True)  # noqa: SIM118
