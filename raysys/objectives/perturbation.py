"""SCR and LSPR: a slightly perturbed copy of each row is to get the same prediction, or to predict the same label."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from raysys.errors import UserError, nearest
from raysys.models.outputs import Embedded, Output
from raysys.nn.collectives import global_sum, world_size
from raysys.objectives.perturbed_rows import Perturbation, check_number, first_rows, joined
from raysys.objectives.supervised import Ranker, Supervised, TaskLosses
from raysys.schema import FeatureSchema

if TYPE_CHECKING:
    from raysys.data.batch import Batch

Consistency = Literal["mse_prob", "mse_logit", "kl"]
Balance = Literal["convex", "ratio"]
_LARGEST_RATIO = 10.0

MakePerturbation = Callable[[FeatureSchema], Perturbation]


class PerturbedSupervised(Supervised):
    """The supervised loss and a term of perturbed copies, which share one lookup, and one pass of 2B rows, with the rows.

    The output, hence the metrics, is that of the rows as they are, and evaluation perturbs nothing. Nothing in our models
    mixes the rows of a batch; in a model with batch normalisation the copies would change its statistics.
    strength: of the term; 0 is the plain objective, bit by bit.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        strength: float,
        perturbation: MakePerturbation,
        task_weights: Mapping[str, float] | None,
        embedding_l2: float,
    ) -> None:
        super().__init__(schema, task_weights=task_weights, embedding_l2=embedding_l2)
        self.strength, self.perturbation = strength, perturbation(schema)

    def forward(self, model: Ranker, batch: Batch, embedded: Embedded) -> tuple[Tensor, Output, dict[str, Tensor]]:
        """As `Supervised.forward`; the part of the copies is beside those of the tasks, before its strength."""
        if not self.training or self.strength == 0:
            return super().forward(model, batch, embedded)
        real = batch.example_id >= 0
        rows, copies = self.perturbation(embedded, real.float())
        output = model.predict(model.interact(joined(embedded, copies)))
        clean = first_rows(output, len(real), len(output.logits))
        losses = self.task_losses(clean.logits, batch)
        per_task, name, value = self.with_copies(losses, clean.logits.float(), output.logits[len(real) :], batch, rows)
        loss, parts = self.add_up(self.weighted(losses._replace(per_task=per_task)), losses, embedded)
        return loss, clean, parts | {name: self.weighted(losses._replace(per_task=value.detach()))}

    @abstractmethod
    def with_copies(
        self, losses: TaskLosses, clean: Tensor, copies: Tensor, batch: Batch, rows: Tensor
    ) -> tuple[Tensor, str, Tensor]:
        """The loss of each task with its term [T], the term's name and its value by task [T].

        clean: logits [B, T]; copies: logits [k, T] of the copies of `rows` [k].
        """


class SCR(PerturbedSupervised):
    """Self-consistency: Σ w l(f(x), y) / Σ w + lambda_ · mean C(f(x), f(x')), x' a perturbed copy, for every task.

    kind: mse_prob (s(f) - s(f'))², mse_logit (f - f')² or kl, KL(s(f) ‖ s(f')); a regression task has (f - f')² always.
    detach_clean: the rows as they are do not follow their copies. unlabeled: rows without a label (or with weight 0) count
    in C, with weight 1. A large lambda_ makes predictions constant. The other arguments: see `Supervised`.

    Ramazanli et al., arXiv 2502.18478, define it in words; the formulas of C are general knowledge of consistency
    regularisation, none was seen in the paper.
    """

    binary: Tensor

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        lambda_: float = 0.1,
        kind: Consistency = "mse_prob",
        detach_clean: bool = False,
        unlabeled: bool = False,
        perturbation: MakePerturbation = Perturbation,
        task_weights: Mapping[str, float] | None = None,
        embedding_l2: float = 0.0,
    ) -> None:
        check_number("lambda_", lambda_, lambda_ >= 0, "of at least 0")
        if kind not in get_args(Consistency):
            raise UserError(f"objective.kind is {kind!r}", nearest(kind, get_args(Consistency)))
        super().__init__(schema, lambda_, perturbation, task_weights, embedding_l2)
        self.kind, self.detach_clean, self.unlabeled = kind, detach_clean, unlabeled
        binary = torch.tensor([label.kind == "binary" for label in schema.labels])
        self.register_buffer("binary", binary, persistent=False)

    def with_copies(
        self, losses: TaskLosses, clean: Tensor, copies: Tensor, batch: Batch, rows: Tensor
    ) -> tuple[Tensor, str, Tensor]:
        """The consistency of all rows that count."""
        first = clean[rows].detach() if self.detach_clean else clean[rows]
        second = copies.float()
        values = torch.where(self.binary, self._difference(first, second), (first - second).square())  # [k, T]
        weight = (batch.weight * batch.label_mask)[rows]
        if self.unlabeled:
            weight = torch.where(weight > 0, weight, (batch.example_id[rows] >= 0).float()[:, None])
        value = _mean(values, weight)
        return losses.per_task + self.strength * value, "consistency", value

    def _difference(self, first: Tensor, second: Tensor) -> Tensor:
        if self.kind == "mse_logit":
            return (first - second).square()
        if self.kind == "mse_prob":
            return (first.sigmoid() - second.sigmoid()).square()
        return first.sigmoid() * (first - second) - F.softplus(first) + F.softplus(second)


class LSPR(PerturbedSupervised):
    """Small perturbations, balanced: copies are trained against the label, so predictions cannot become constant.

    balance: convex, (1 - alpha) · l(f(x), y) + alpha · l(f(x'), y), keeps the scale of the loss; ratio, l + alpha · sg(l / l')
    · l', lets both terms weigh 1 : alpha whatever their sizes (the ratio within 0.1 … 10, of the joint batch, for each task).
    A copy has its row's label and weight, rows without a label have no part. The other arguments: see `Supervised`.

    Ramazanli et al., arXiv 2502.18478. **Its formula was not seen**: this is our reading of its name, of the contrast to
    self-consistency and of our analysis. A balance over groups of the data, another reading, is not offered.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        alpha: float = 0.1,
        balance: Balance = "convex",
        perturbation: MakePerturbation = Perturbation,
        task_weights: Mapping[str, float] | None = None,
        embedding_l2: float = 0.0,
    ) -> None:
        if balance not in get_args(Balance):
            raise UserError(f"objective.balance is {balance!r}", nearest(balance, get_args(Balance)))
        convex = balance == "convex"
        check_number(
            "alpha", alpha, 0 <= alpha <= (1 if convex else math.inf), "of 0 to 1" if convex else "of at least 0"
        )
        super().__init__(schema, alpha, perturbation, task_weights, embedding_l2)
        self.balance = balance

    def with_copies(
        self, losses: TaskLosses, clean: Tensor, copies: Tensor, batch: Batch, rows: Tensor
    ) -> tuple[Tensor, str, Tensor]:
        """The loss of the copies against their rows' labels."""
        values = self._row_losses(copies.float(), batch.labels[rows])  # [k, T]
        value = _mean(values, (batch.weight * batch.label_mask)[rows])
        if self.balance == "convex":
            return torch.lerp(losses.per_task, value, self.strength), "perturbed", value
        plain, other = global_sum(torch.stack([losses.per_task, value]))
        ratio = torch.where(other > 0, plain / other, 1.0).clamp(1 / _LARGEST_RATIO, _LARGEST_RATIO)  # [T]
        return losses.per_task + self.strength * ratio * value, "perturbed", value


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    """The weighted mean of each column of [k, T] over the joint batch, this rank's share of it (collective)."""
    total = global_sum(weight.sum(0))
    return world_size() * (weight * values).sum(0) / torch.where(total > 0, total, 1.0)
