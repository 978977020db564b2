"""Checkpoints: a `torch.distributed.checkpoint` folder that loads under another plan and on another number of workers.

step_00000120/
  .metadata, __0_0.distcp, ...   tensors, written by every rank (the pickle `.metadata` is why checkpoints must come
                                 from storage that you trust)
  state.json                     step, reader position, early stopping, config, schema, versions
  window.safetensors             losses and metrics since the last step event
  transforms/                    vocabularies and normalisers
  manifest.json                  sha256 of every file above, written last: without it the folder does not exist
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import PositiveInt
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from raysys.errors import UserError
from raysys.hashed_folder import MANIFEST, files_of, find_damage, hash_files, read_json, read_manifest, write_manifest
from raysys.nn.collectives import is_distributed, rank, world_size

FORMAT_VERSION = 2


@dataclass(frozen=True)
class CheckpointSettings:
    """When checkpoints are written and which are kept; the one of the best evaluation is kept besides the last ones."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    every_steps: PositiveInt | None = None
    keep: PositiveInt = 2


def save_checkpoint(
    folder: Path, tensors: dict[str, Any], state: dict[str, Any], write_files: Callable[[Path], None]
) -> int:
    """Write one checkpoint (collective: every rank calls it) and return its bytes.

    tensors: a nested dict of tensors, ShardedTensors and DTensors with the same keys under every plan. state: plain
    data for `state.json`. write_files: called on rank 0 to put further files into the folder.
    """
    if rank() == 0:
        _remove(folder)  # what a killed run left half-written
        folder.mkdir(parents=True)
    _barrier()
    dcp.save(tensors, checkpoint_id=str(folder), no_dist=not is_distributed())
    if rank() == 0:
        write_files(folder)
        (folder / "state.json").write_text(json.dumps({"format_version": FORMAT_VERSION, **state}, indent=1))
    _barrier()
    hashes = _gather_dicts(hash_files(folder, _own_share(files_of(folder))))
    if rank() == 0:
        write_manifest(folder, FORMAT_VERSION, hashes)
    _barrier()
    return sum((folder / name).stat().st_size for name in hashes)


def load_tensors(folder: Path, tensors: dict[str, Any]) -> None:
    """Fill `tensors` in place from a verified checkpoint (collective where a process group exists)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as is meant, in one process
        dcp.load(tensors, checkpoint_id=str(folder), no_dist=not is_distributed())


def verify_checkpoint(folder: Path) -> dict[str, Any]:
    """Check format and hashes of every file and return `state.json` (collective: the ranks share the hashing).

    Raises UserError naming the file that is missing or changed.
    """
    hashes = read_manifest(folder, FORMAT_VERSION)
    damage = find_damage(folder, hashes, _own_share(sorted(hashes)))
    for name, what in sorted(_gather_dicts(damage).items()):
        raise UserError(f"{folder / name} {what}", "the checkpoint is damaged: resume from another one")
    return read_json(folder / "state.json")


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path.parent for path in Path(folder).glob(f"step_*/{MANIFEST}"))


def checkpoint_path(folder: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return Path(folder) / f"step_{step:08d}"


def take_latest(folder: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint whose hashes hold, with its `state.json` (collective).

    `warn` hears of each damaged one that is passed over. It is renamed to `damaged_step_...`, so that it neither counts as
    one to keep nor stands where the run will write its next one.
    """
    for path in reversed(list_checkpoints(folder)):
        try:
            return path, verify_checkpoint(path)
        except UserError as error:
            warn(f"{error.message}: taking an older checkpoint")
            if rank() == 0:
                aside = path.with_name(f"damaged_{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
    return None


def remove_old(folder: Path, keep: int, best: Path | None) -> None:
    """Delete all but the `keep` newest checkpoints and the best one, and what killed runs left (rank 0 only)."""
    complete = list_checkpoints(folder)
    for path in Path(folder).glob("step_" + 8 * "[0-9]"):
        if path not in complete[-keep:] and path != best:
            _remove(path)


def saved_sizes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The sizes of all tensors in a checkpoint by their names, nested ones joined by dots."""
    saved = dcp.FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in saved.items() if isinstance(entry, TensorStorageMetadata)}


def _remove(folder: Path) -> None:
    """Delete a checkpoint, first of all what makes it one."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _own_share(names: list[str]) -> list[str]:
    return names[rank() :: world_size()]


def _gather_dicts(content: dict[str, str]) -> dict[str, str]:
    """The union of the dicts of all ranks."""
    if not is_distributed():
        return content
    gathered: list[dict[str, str]] = [{} for _ in range(world_size())]
    dist.all_gather_object(gathered, content)
    return {key: value for part in gathered for key, value in part.items()}


def _barrier() -> None:
    if is_distributed():
        dist.barrier()
