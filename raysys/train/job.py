"""What a run is made of, as plain data that travels to the workers, and how a worker builds it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raysys.config import Config, instantiate, validate
from raysys.data.log import ParquetLog, split_path
from raysys.data.reader import Reader
from raysys.data.transforms import Transforms
from raysys.errors import UserError
from raysys.schema import FeatureSchema
from raysys.train.settings import TrainerSettings, TrainSettings
from raysys.train.step import TrainStep


@dataclass(frozen=True)
class Job:
    """A resolved config with what was made of its data; pickled to every worker."""

    config: Config
    schema: FeatureSchema
    transforms: Transforms
    folder: Path
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
            split_path(self.config["data"]["folder"], split)
        except UserError:
            return False
        return True

    def log(self, split: str, labels: bool = True) -> ParquetLog:
        """One split of the data set, opened."""
        return ParquetLog(split_path(self.config["data"]["folder"], split), self.schema, labels=labels)

    def reader(self, log: ParquetLog, *, training: bool, rank: int, world_size: int, labels: bool = True) -> Reader:
        """A reader of this rank's rows: shuffled for training, in the order of the file for evaluation."""
        data, settings = self.config["data"], self.train
        return Reader(
            log,
            self.transforms,
            batch_size=settings.batch_size if training else settings.evaluation_batch_size,
            shards=data["shards"],
            rank=rank,
            world_size=world_size,
            seed=self.seed,
            shuffle_rows=data["shuffle_rows"] if training else 0,
            prefetch=data["prefetch"],
            labels=labels,
        )

    def model(self, device: str) -> nn.Module:
        """The plain model of the config; `device="meta"` gives its tables no memory."""
        return self.build_model(self.schema, device)

    def build_model(self, schema: FeatureSchema, device: str = "cpu") -> nn.Module:
        """The model of the config for another schema, such as one with smaller tables."""
        return instantiate(self.config["model"], schema=schema, seed=self.seed, device=device)

    def train_step(self, device: str) -> TrainStep:
        """Model and objective as the one module that is sharded and trained."""
        objective = instantiate(self.config["objective"], schema=self.schema)
        return TrainStep(self.model(device), objective, precision=self.train.precision)


def step_seed(seed: int, rank: int, step: int) -> None:
    """Seed dropout as a function of (seed, rank, step), so that a resumed run draws what an undisturbed one draws."""
    torch.manual_seed((seed * 1_000_003 + rank) * 1_000_000_007 + step)


def limit_threads(cpus: float) -> None:
    """Use no more threads than this worker has CPUs: more of them made steps 3 to 6 times slower."""
    torch.set_num_threads(max(int(cpus), 1))


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    """The device of a worker; `auto` is CUDA where there is one."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", local_rank % max(torch.cuda.device_count(), 1))


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
