"""What of a run goes into a checkpoint, and how it comes back under any plan and number of workers."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from raysys.errors import UserError
from raysys.models.assembly import Assembly
from raysys.models.tokens import TokenStack
from raysys.nn.collectives import communication_device, global_sum
from raysys.train.checkpoint import load_tensors, save_checkpoint, saved_sizes, verify_checkpoint
from raysys.train.job import versions
from raysys.train.tables import find_tables, forget_cached_rows, local_parts, table_weights

if TYPE_CHECKING:
    from raysys.train.loop import TrainLoop

WINDOW = "window.safetensors"


def save_state(folder: Path, loop: TrainLoop) -> int:
    """Write the loop's state as a checkpoint and return its bytes (collective).

    Raises UserError, before anything is written, where a weight is not finite: a run could not go on from there.
    """
    tensors = _tensors(loop)
    _check_finite(tensors, loop.step)
    window = loop.window.state()
    state = {
        "step": loop.step,
        "position": loop.position.to_dict(),
        "best": loop.best.state(),
        "seed": loop.job.seed,
        "config": loop.job.config,
        "schema": loop.job.schema.to_dict(),
        "schema_hash": loop.job.schema.fingerprint(),
        "tokens": _token_names(loop.model),
        "versions": versions(),
    }

    def write_files(path: Path) -> None:
        loop.job.transforms.save(path / "transforms")
        save_file(window, path / WINDOW)

    return save_checkpoint(folder, tensors, state, write_files)


def load_state(folder: Path, state: dict[str, Any], loop: TrainLoop) -> None:
    """Load a verified checkpoint, whose `state.json` is `state`, into the loop's model and optimisers (collective).

    Learning rates and dropout follow from the step, so they continue too.
    """
    _check_schema(folder, state, loop.job.schema.fingerprint())
    _load(folder, state, loop.model, _tensors(loop))
    loop.optimizers.set_step(state["step"])
    loop.window.load(load_file(folder / WINDOW), loop.device)


def load_weights(folder: Path, module: nn.Module) -> None:
    """Verify a checkpoint and load its weights alone into a plain or sharded TrainStep (collective under a process group)."""
    state = verify_checkpoint(folder)
    _load(folder, state, module, {"dense": dense_tensors(module), "tables": table_weights(module)})


def dense_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, without the embedding tables; they share memory with the module."""
    tables = tuple(f"{table.path}." for table in find_tables(module))
    return {
        name: tensor.detach()
        for name, tensor in module.state_dict().items()
        if isinstance(tensor, Tensor) and not name.startswith(tables)
    }


def _load(folder: Path, state: dict[str, Any], module: nn.Module, tensors: dict[str, Any]) -> None:
    _check_tokens(folder, state["tokens"], _token_names(module))
    _check_sizes(folder, tensors)
    load_tensors(folder, tensors)
    forget_cached_rows(module)


def _tensors(loop: TrainLoop) -> dict[str, Any]:
    return {
        "dense": dense_tensors(loop.model),
        "tables": table_weights(loop.model),
        "sparse_optimizer": {table: state for table, state in loop.optimizers.table_states().items() if state},
        "dense_optimizer": loop.optimizers.dense_states(),
    }


def _check_schema(folder: Path, state: dict[str, Any], expected: str) -> None:
    if state["schema_hash"] != expected:
        raise UserError(
            f"{folder}: the checkpoint was made with another schema ({state['schema_hash']}, now {expected})",
            "train from the start, or restore the schema.yaml of that run",
        )


def _token_names(module: nn.Module) -> list[str]:
    """All tokens of a model in their order, which the dense weights behind them stand for."""
    return [name for part in module.modules() if isinstance(part, Assembly | TokenStack) for name in part.names]


def _check_tokens(folder: Path, saved: list[str], now: list[str]) -> None:
    for place, (before, after) in enumerate(zip_longest(saved, now)):
        if before != after:
            raise UserError(
                f"{folder}: token {place} of the model was {before!r} when the checkpoint was made, and is {after!r} now",
                "the order of a model's features belongs to its weights: restore it",
            )


def _check_finite(tensors: dict[str, Any], step: int) -> None:
    """Collective: a weight or optimiser state that is not finite on any rank is an error on all."""
    values = _flattened(tensors)
    broken = torch.tensor([not _is_finite(value) for value in values.values()], dtype=torch.float64)
    names = [
        name for name, bad in zip(values, global_sum(broken.to(communication_device())).tolist(), strict=True) if bad
    ]
    if names:
        raise UserError(
            f"step {step}: {', '.join(names[:3])} {'is' if len(names) == 1 else 'are'} not finite; no checkpoint was written",
            "lower train.optimizers.*.lr, or clip gradients with train.optimizers.clip",
        )


def _flattened(tensors: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tensors.items():
        found |= _flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _is_finite(value: Any) -> bool:
    """Whether this rank's part of a tensor is finite; the sum needs no memory, and is looked at closely where it is not."""
    parts = [value.to_local()] if isinstance(value, DTensor) else [part.values for part in local_parts(value)]
    return all(bool(part.sum().isfinite()) or bool(part.isfinite().all()) for part in parts)


def _check_sizes(folder: Path, tensors: dict[str, Any]) -> None:
    """These parts of the checkpoint must be those of the model; a difference is named before anything is overwritten."""
    saved = {name: size for name, size in saved_sizes(folder).items() if name.partition(".")[0] in tensors}
    expected = {name: tuple(value.size()) for name, value in _flattened(tensors).items()}
    for name in sorted(saved.keys() | expected.keys()):
        if saved.get(name) != expected.get(name):
            found, wanted = (f"size {list(sizes[name])}" if name in sizes else "none" for sizes in (saved, expected))
            raise UserError(
                f"{folder}: {name} has {found} in the checkpoint, the model has {wanted}",
                "it was made with another model or optimiser: use the config that stands in its state.json",
            )
