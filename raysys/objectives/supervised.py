"""The plain supervised loss: cross-entropy for binary tasks, squared error for regression tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raysys.errors import UserError, nearest
from raysys.nn.collectives import global_sum, world_size
from raysys.schema import FeatureSchema

if TYPE_CHECKING:
    from raysys.data.batch import Batch
    from raysys.models.outputs import Embedded, Output


class Ranker(Protocol):
    """What an objective calls of a ranking model; the embedding lookup is done by its caller."""

    def interact(self, embedded: Embedded) -> Tensor:
        """Shared representation [B, H]."""

    def predict(self, shared: Tensor) -> Output:
        """Logits [B, T] and what else the heads give."""


class TaskLosses(NamedTuple):
    """per_task: [T], this rank's share of each task's loss. labelled: [T], the summed weight of all ranks' labelled rows."""

    per_task: Tensor
    labelled: Tensor


class Supervised(nn.Module):
    """Σ over tasks of task weight · (Σ w l / Σ w), rows without a label left out, plus an optional embedding regulariser.

    Per rank it is W · Σ w l (its own rows) / Σ w (all ranks' rows): averaged over ranks, as data-parallel training averages
    gradients, that is the loss of the joint batch, however rows and labels are spread. A task without a label in the whole
    batch contributes 0.

    task_weights: factor of each task's loss, 1 where none is named.
    embedding_l2: λ of λ/2 · mean over rows of Σ |e|² over the row's looked-up embeddings (a sequence counts as one, by the
        mean over its events). Only rows that were looked up shrink, in proportion to how often; it helps small logs most.
    """

    def __init__(
        self, schema: FeatureSchema, *, task_weights: Mapping[str, float] | None = None, embedding_l2: float = 0.0
    ) -> None:
        super().__init__()
        check_key("embedding_l2", embedding_l2, embedding_l2 >= 0, "a number of at least 0")
        self.labels, self.embedding_l2 = schema.labels, embedding_l2
        self.task_weights = _check_weights(schema, task_weights or {})
        self.factors: Tensor
        self.binary: Tensor
        self.register_buffer("factors", torch.tensor(self.task_weights), persistent=False)
        self.register_buffer("binary", torch.tensor([label.kind == "binary" for label in schema.labels]), False)
        self._has_regression = any(label.kind != "binary" for label in schema.labels)

    def forward(self, model: Ranker, batch: Batch, embedded: Embedded) -> tuple[Tensor, Output, dict[str, Tensor]]:
        """Loss (scalar), the model's output, and each task's loss before its task weight (detached).

        The parts are this rank's share, like the loss: their average over ranks is the value on the joint batch.
        """
        output = model.predict(model.interact(embedded))
        losses = self.task_losses(output.logits, batch)
        loss, parts = self.add_up(self.weighted(losses), losses, batch, embedded)
        return loss, output, parts

    def task_losses(self, logits: Tensor, batch: Batch) -> TaskLosses:
        """Each task's mean loss over the joint batch, this rank's share of it (collective)."""
        rows = self._row_losses(logits.float(), batch.labels)  # [B, T]
        weight = batch.weight * batch.label_mask
        labelled = global_sum(weight.sum(0))  # [T]
        return TaskLosses(world_size() * (weight * rows).sum(0) / or_one(labelled), labelled)

    def weighted(self, losses: TaskLosses) -> Tensor:
        """The sum over tasks of task weight times loss."""
        return (self.factors * losses.per_task).sum()

    def add_up(
        self, loss: Tensor, losses: TaskLosses, batch: Batch, embedded: Embedded
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The tasks' `loss` with the regulariser of the rows that are no padding, and the parts."""
        parts = {label.name: part for label, part in zip(self.labels, losses.per_task.detach().unbind(), strict=True)}
        if self.embedding_l2 > 0:
            counted = (batch.weight > 0).any(1).float()  # [B]
            squares = (counted * squared_norms(embedded)).sum()  # not a matmul, which autocast would do in bfloat16
            penalty = 0.5 * self.embedding_l2 * world_size() * squares / or_one(global_sum(counted.sum()))
            loss, parts["embedding_l2"] = loss + penalty, penalty.detach()
        return loss, parts

    def _row_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of each row and task [B, T]: cross-entropy in nats or squared error."""
        rows = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return torch.where(self.binary, rows, (logits - labels).square()) if self._has_regression else rows


def check_key(key: str, value: Any, holds: bool, expected: str) -> None:
    """Raise UserError unless the value of a key of the objective's config is as expected."""
    if not holds:
        raise UserError(f"objective.{key} is {value}", f"{expected} is expected")


def squared_norms(embedded: Embedded) -> Tensor:
    """Σ |e|² over each row's tokens, sequences (mean over the events that are there) and ensemble members: [B]."""
    total = embedded.tokens.float().square().sum((1, 2))  # [B]
    for values, mask in embedded.sequences.values():
        events = values.float().square().sum(2) * mask  # [B, L]
        total = total + events.sum(1) / mask.sum(1).clamp(min=1)
    for member in embedded.members.values():
        total = total + squared_norms(member)
    return total


def or_one(total: Tensor) -> Tensor:
    """`total`, and 1 where it is 0: what is divided by it is 0 there as well."""
    return torch.where(total > 0, total, torch.ones_like(total))


def _check_weights(schema: FeatureSchema, task_weights: Mapping[str, Any]) -> list[float]:
    for task, weight in task_weights.items():
        if task not in schema.tasks:
            raise UserError(f"objective.task_weights: no task {task!r} in {schema.source}", nearest(task, schema.tasks))
        if not float(weight) >= 0:
            raise UserError(f"objective.task_weights.{task} is {weight}", "a number of at least 0 is expected")
    return [float(task_weights.get(task, 1.0)) for task in schema.tasks]
