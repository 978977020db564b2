"""Early stopping: the best evaluation so far and how long ago it was."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean
from typing import Any

from raysys.errors import UserError, nearest
from raysys.schema import FeatureSchema
from raysys.train.checkpoint import checkpoint_path
from raysys.train.retrieval import retrieval_task
from raysys.train.settings import EarlyStopping, RetrievalSettings

ALL_TASKS = "all"
_METRICS = {"binary": ("ne", "log_loss", "auc", "gauc"), "regression": ("rmse", "mae")}


class BestSoFar:
    """Watches one metric of the validation split, of one task or its mean over all tasks that have it.

    Without settings nothing is watched and nothing stops.
    """

    def __init__(
        self, settings: EarlyStopping | None, schema: FeatureSchema, retrieval: RetrievalSettings | None = None
    ) -> None:
        self.settings = settings
        self.tasks: list[str] = []
        if settings is not None:
            self.tasks = _tasks(settings, schema) if retrieval is None else _retrieval(settings, schema, retrieval)
        self.step: int | None = None
        self.value = math.nan
        self.stale = 0
        self.evaluated: int | None = None
        """The step of the last evaluation, whether it was better or not."""

    def update(self, tasks: dict[str, dict[str, float]], step: int) -> bool:
        """Take an evaluation; True where it is the best so far. An undefined metric never is."""
        self.evaluated = step
        if self.settings is None:
            return False
        value = mean(tasks[task][self.settings.metric] for task in self.tasks)
        gain = value - self.value if self.settings.larger_is_better else self.value - value
        better = not math.isnan(value) and (self.step is None or gain > 0)
        if better:
            self.step, self.value, self.stale = step, value, 0
        else:
            self.stale += 1
        return better

    @property
    def patience_is_over(self) -> bool:
        """Whether too many evaluations in a row were no better."""
        return self.settings is not None and self.stale >= self.settings.patience

    def path(self, checkpoints: Path) -> Path | None:
        """The checkpoint of the best evaluation."""
        return None if self.step is None else checkpoint_path(checkpoints, self.step)

    def state(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        value = None if math.isnan(self.value) else self.value
        return {"step": self.step, "value": value, "stale": self.stale, "evaluated": self.evaluated}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        self.step, self.stale, self.evaluated = state["step"], state["stale"], state["evaluated"]
        self.value = math.nan if state["value"] is None else state["value"]


def _retrieval(settings: EarlyStopping, schema: FeatureSchema, retrieval: RetrievalSettings) -> list[str]:
    """The task of a retrieval model; a UserError where the metric is none of retrieval."""
    known = [f"{metric}@{k}" for metric in ("recall", "ndcg") for k in retrieval.at] + ["mrr"]
    if settings.metric not in known:
        raise UserError(
            f"train.early_stopping.metric is {settings.metric!r}, which retrieval does not have",
            f"take one of: {', '.join(known)}",
        )
    return [retrieval_task(schema, retrieval)]


def _tasks(settings: EarlyStopping, schema: FeatureSchema) -> list[str]:
    """The tasks whose metric is watched; a UserError where there is none that has it."""
    metric, wanted = settings.metric, settings.task or schema.tasks[0]
    kinds = {label.name: label.kind for label in schema.labels if wanted in (label.name, ALL_TASKS)}
    if not kinds:
        raise UserError(
            f"train.early_stopping.task {wanted!r} is no label", nearest(wanted, [*schema.tasks, ALL_TASKS])
        )
    found = [name for name, kind in kinds.items() if metric in _METRICS[kind]]
    if not found:
        name, kind = next(iter(kinds.items()))
        raise UserError(
            f"train.early_stopping.metric is {metric!r}, which the {kind} task {name!r} does not have",
            f"take one of: {', '.join(_METRICS[kind])}",
        )
    if metric == "gauc" and schema.group_id is None:
        raise UserError(
            "train.early_stopping.metric is 'gauc', but the schema has no group_id", "name one, or take 'auc'"
        )
    return found
