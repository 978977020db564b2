"""What of a run goes into a checkpoint, and how it comes back under any plan and number of workers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from raysys.errors import UserError
from raysys.train.checkpoint import load_tensors, save_checkpoint, saved_names, verify_checkpoint
from raysys.train.job import versions
from raysys.train.tables import find_tables, forget_cached_rows, table_weights

if TYPE_CHECKING:
    from raysys.train.loop import TrainLoop


def save_state(folder: Path, loop: TrainLoop) -> int:
    """Write the loop's state as a checkpoint and return its bytes (collective)."""
    state = {
        "step": loop.step,
        "position": loop.position.to_dict(),
        "best": loop.best.state(),
        "seed": loop.job.seed,
        "config": loop.job.config,
        "schema": loop.job.schema.to_dict(),
        "schema_hash": loop.job.schema.fingerprint(),
        "versions": versions(),
    }

    def write_files(path: Path) -> None:
        loop.job.transforms.save(path / "transforms")

    return save_checkpoint(folder, _tensors(loop), state, write_files)


def load_state(folder: Path, loop: TrainLoop) -> dict[str, Any]:
    """Verify a checkpoint, load it into the loop's model and optimisers, and return its `state.json` (collective).

    Learning rates and dropout follow from the step, so they continue too.
    """
    state = verify_checkpoint(folder)
    _check_schema(folder, state, loop.job.schema.fingerprint())
    tensors = _tensors(loop)
    _check_names(folder, tensors)
    load_tensors(folder, tensors)
    forget_cached_rows(loop.model)
    loop.optimizers.set_step(state["step"])
    return state


def load_weights(folder: Path, module: nn.Module) -> dict[str, Any]:
    """Load the weights alone into a plain or sharded TrainStep and return `state.json` (collective under a process group)."""
    state = verify_checkpoint(folder)
    tensors = {"dense": dense_tensors(module), "tables": table_weights(module)}
    _check_names(folder, tensors)
    load_tensors(folder, tensors)
    forget_cached_rows(module)
    return state


def dense_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, without the embedding tables; they share memory with the module."""
    tables = tuple(f"{table.path}." for table in find_tables(module))
    return {
        name: tensor.detach()
        for name, tensor in module.state_dict().items()
        if isinstance(tensor, Tensor) and not name.startswith(tables)
    }


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


def _check_names(folder: Path, tensors: dict[str, Any]) -> None:
    """The parts of the model must be those of the checkpoint; a missing one is named before anything is overwritten."""
    saved = saved_names(folder)
    for part, content in tensors.items():
        for name in content:
            if not any(key == f"{part}.{name}" or key.startswith(f"{part}.{name}.") for key in saved):
                raise UserError(
                    f"{folder}: the checkpoint has no {part} {name!r}",
                    "it was made with another model or optimiser: use the config that stands in its state.json",
                )
