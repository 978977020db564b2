"""What a run is made of, as plain data that travels to the workers, and how a worker builds it."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raysys.config import Config, arguments_of, instantiate, locate, validate
from raysys.data.catalogue import CatalogueItems, load_catalogue
from raysys.data.log import ParquetLog, split_path
from raysys.data.reader import Reader
from raysys.data.transforms import Transforms
from raysys.errors import UserError
from raysys.schema import FeatureSchema
from raysys.train.retrieval import retrieval_task
from raysys.train.settings import DataSettings, TrainerSettings, TrainSettings
from raysys.train.step import TrainStep

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _NEVER = -1, -3, 2**31 - 1  # of glibc's malloc.h


@dataclass(frozen=True)
class Job:
    """A resolved config with what was made of its data; pickled to every worker.

    folder: of the run. data: the folder of the data set, or its URI. Both are absolute: Ray's workers stand elsewhere.
    resume: a checkpoint to start from where the run has none of its own.
    """

    config: Config
    schema: FeatureSchema
    transforms: Transforms
    folder: Path
    data: str
    resume: Path | None = None

    @property
    def train(self) -> TrainSettings:
        """The `train` group, validated."""
        return validate(TrainSettings, self.config["train"], "train")

    @property
    def trainer(self) -> TrainerSettings:
        """The `trainer` group, validated."""
        return validate(TrainerSettings, self.config["trainer"], "trainer")

    @property
    def reading(self) -> DataSettings:
        """The `data` group, validated."""
        return validate(DataSettings, self.config["data"], "data")

    @property
    def seed(self) -> int:
        """The seed of initial weights, shuffling and dropout."""
        return int(self.config["seed"])

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.folder / "checkpoints"

    def has_split(self, split: str) -> bool:
        """Whether the data set has this split."""
        try:
            split_path(self.data, split)
        except UserError:
            return False
        return True

    def log(self, split: str, labels: bool = True) -> ParquetLog:
        """One split of the data set, opened."""
        return ParquetLog(split_path(self.data, split), self.schema, labels=labels)

    def reader(self, log: ParquetLog, *, training: bool, rank: int, world_size: int, labels: bool = True) -> Reader:
        """A reader of this rank's rows: shuffled for training, in the order of the file for evaluation."""
        data, settings = self.reading, self.train
        return Reader(
            log,
            self.transforms,
            batch_size=settings.batch_size if training else settings.evaluation_batch_size,
            shards=data.shards,
            rank=rank,
            world_size=world_size,
            seed=self.seed,
            shuffle_rows=data.shuffle_rows if training else 0,
            prefetch=data.prefetch,
            labels=labels,
            keep_groups_whole=training and data.keep_groups_whole,
        )

    def model(self, device: str) -> nn.Module:
        """The plain model of the config; `device="meta"` gives its tables no memory."""
        return self.build_model(self.schema, device)

    def build_model(self, schema: FeatureSchema, device: str = "cpu") -> nn.Module:
        """The model of the config for another schema, such as one with smaller tables."""
        return instantiate(self.config["model"], schema=schema, seed=self.seed, device=device)

    def items(self) -> CatalogueItems:
        """The item catalogue with the counts of the training split; of runs with `train.retrieval`."""
        assert self.train.retrieval is not None
        task = retrieval_task(self.schema, self.train.retrieval)
        return load_catalogue(self.data, self.schema, self.transforms, self.log("train"), task)

    def train_step(self, device: str) -> TrainStep:
        """Model and objective as the one module that is sharded and trained."""
        target = locate(self.config["objective"].get("_target_", ""))
        wanted = arguments_of(target) or {}
        if "items" in wanted and self.train.retrieval is None:
            raise UserError(
                f"{target.__name__} trains retrieval from a catalogue, and train.retrieval is null",
                "train.retrieval={}, or one of the experiments for retrieval",
            )
        given: dict[str, Any] = {"items": self.items()} if "items" in wanted else {}
        objective = instantiate(self.config["objective"], schema=self.schema, **given)
        if getattr(objective, "whole_groups", False) and not self.reading.keep_groups_whole:
            raise UserError(
                f"{type(objective).__name__} has a loss within a request, and batches may cut requests",
                "data.keep_groups_whole=true",
            )
        return TrainStep(self.model(device), objective, precision=self.train.precision)


def absolute(path: str) -> str:
    """A local path made absolute; a URI as it is."""
    return path if "://" in path else str(Path(path).resolve())


def step_seed(seed: int, rank: int, step: int) -> int:
    """The seed of what is drawn in a step, so that a resumed run draws what an undisturbed one draws."""
    return (seed * 1_000_003 + rank) * 1_000_000_007 + step


def seed_draws(value: int) -> None:
    """Seed this process's generators as `torch.manual_seed` does, which formats a stack trace at each call (0.3 ms)."""
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(value)


def set_up_process(cpus: float) -> None:
    """Settings of a worker's process: no more threads than it has CPUs, and freed memory kept for the next step.

    More threads than CPUs made steps 3 to 6 times slower. glibc hands each large tensor back to the kernel when it is freed
    and pays page faults for the next one, 17 to 20% of a DHEN step.
    """
    torch.set_num_threads(max(int(cpus), 1))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _NEVER)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    """The device of a worker; `auto` is CUDA where there is one."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("trainer.device is 'cuda', and torch finds no GPU here", "raysys doctor says why; or take cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def device_type(trainer: TrainerSettings) -> str:
    """`cpu` or `cuda`, what the workers compute on, as the driver has to know it."""
    if trainer.kind == "local":
        return choose_device(trainer.device).type
    if trainer.device == "auto":
        raise UserError(
            "trainer.device is 'auto', but the driver may have other devices than Ray's workers", "cpu or cuda"
        )
    return trainer.device


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    import platform
    from importlib.metadata import version

    names = ("torch", "torchrec", "ray", "pyarrow", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def machine() -> dict[str, Any]:
    """The shape of this machine."""
    import psutil

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpus": os.cpu_count(), "memory_bytes": psutil.virtual_memory().total, "gpu": gpu}
