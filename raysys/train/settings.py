"""The settings of a training run: its config, typed, but for the arguments of the classes that it names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from raysys.train.checkpoint import CheckpointSettings
from raysys.train.optimizers import OptimizerSettings
from raysys.train.plan import ShardingSettings

Word = Annotated[str, Field(coerce_numbers_to_str=True)]
"""Text that may look like a number on the command line: `run_id=7`."""
Pipeline = Literal["auto", "base", "sparse_dist"]


@dataclass(frozen=True)
class EarlyStopping:
    """Stop after `patience` evaluations of the validation split without a better `metric`.

    task: whose metric; None is the first task, "all" the mean over all tasks that have the metric.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    metric: str = "ne"
    task: str | None = None
    patience: PositiveInt = 2

    @property
    def larger_is_better(self) -> bool:
        """Whether the metric grows with quality."""
        return self.metric.startswith(("auc", "gauc", "recall@", "ndcg@", "mrr"))


@dataclass(frozen=True)
class RetrievalSettings:
    """What a retrieval model is trained for and measured by, over the full catalogue.

    task: the label that makes a row positive; None is the first binary one. exclude: a list column with the items that a row
    already has (their keys, oldest first), which are not recommended again. at: the K of recall@K and NDCG@K.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    task: str | None = None
    exclude: str | None = None
    at: tuple[PositiveInt, ...] = (5, 10, 50)


@dataclass(frozen=True)
class TrainSettings:
    """One run of the train loop; `batch_size` counts the rows of a step over all workers."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    batch_size: PositiveInt = 2048
    epochs: PositiveInt = 1
    max_steps: PositiveInt | None = None
    log_every: PositiveInt = 20
    evaluate_every: PositiveInt | None = None
    evaluation_batch_size: PositiveInt = 8192
    slices: tuple[str, ...] = ()
    calibration: Literal["none", "platt", "isotonic"] = "none"
    pipeline: Pipeline = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    early_stopping: EarlyStopping | None = None
    retrieval: RetrievalSettings | None = None
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    optimizers: OptimizerSettings = field(default_factory=OptimizerSettings)
    sharding: ShardingSettings = field(default_factory=ShardingSettings)


@dataclass(frozen=True)
class TrainerSettings:
    """Where the workers run: `local` is the calling process (one rank, no Ray), `ray` is Ray Train.

    hang_timeout_s: a worker that neither steps nor answers for so long is taken for hung and the group is restarted.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    kind: Literal["local", "ray"] = "local"
    workers: PositiveInt = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cpus_per_worker: PositiveFloat = 1.0
    max_failures: int = 3
    hang_timeout_s: PositiveFloat = 120.0
    start_timeout_s: PositiveFloat = 120.0
    address: str | None = None


@dataclass(frozen=True)
class DataSettings:
    """Where the data set is and how it is read; `prepare` names the function that makes it where it is missing."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    folder: Word
    shards: PositiveInt
    shuffle_rows: NonNegativeInt
    prefetch: NonNegativeInt
    keep_groups_whole: bool = False
    prepare: dict[str, Any] | None = None


@dataclass(frozen=True)
class Settings:
    """A config of jobs/train.py; the classes that `model` and `objective` name check their arguments themselves."""

    name: Word
    seed: int
    runs_folder: Word
    run_id: Word | None
    resume: str
    data: DataSettings
    train: TrainSettings
    trainer: TrainerSettings
    model: dict[str, Any]
    objective: dict[str, Any]
