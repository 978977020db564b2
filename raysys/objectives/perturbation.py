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
from raysys.objectives.id_drop import COPIED
from raysys.objectives.perturbed_rows import Perturbation, first_rows, joined, map_rows
from raysys.objectives.supervised import Ranker, Supervised, TaskLosses, check_key, or_one
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
        counted = (batch.example_id >= 0).float()
        if self.perturbation.id_drop > 0:
            rows = batch.extra.get(COPIED)
            assert isinstance(rows, Tensor), "id_drop: batches must go through augment before the lookup"
            count = len(counted) - len(rows)
            own, looked_up = (
                map_rows(embedded, lambda value: value[:count]),
                map_rows(embedded, lambda value: value[count:]),
            )
            copies = self.perturbation.perturb(looked_up, counted[rows])
        else:
            own, count = embedded, len(counted)
            rows, copies = self.perturbation(embedded, counted)
        whole = model.predict(model.interact(joined(own, copies)))
        output = first_rows(whole, len(counted), len(whole.logits))  # a row for each row of the batch
        losses = self.task_losses(output.logits, batch)
        clean, perturbed = whole.logits[:count].float(), whole.logits[count:]
        per_task, name, value = self.with_copies(losses, clean, perturbed, batch, rows)
        loss, parts = self.add_up(self.weighted(losses._replace(per_task=per_task)), losses, batch, embedded)
        return loss, output, parts | {name: self.weighted(losses._replace(per_task=value.detach()))}

    def augment(self, batch: Batch, seed: int) -> Batch:
        """Called by the train loop before the lookup: the copies that `id_drop` needs; seed: of this rank and step."""
        return batch if self.strength == 0 else self.perturbation.augment(batch, seed)

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
        check_key("lambda_", lambda_, lambda_ >= 0, "a number of at least 0")
        if kind not in get_args(Consistency):
            raise UserError(f"objective.kind is {kind!r}", nearest(kind, get_args(Consistency)))
        super().__init__(schema, lambda_, perturbation, task_weights, embedding_l2)
        self.kind, self.detach_clean, self.unlabeled = kind, detach_clean, unlabeled

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
    balance_groups: of balance=ratio, a sparse feature with `max_length` 1 (surface, region, whether a signal is there): each
    of its values has a ratio of its own, and so have rows without one. A copy has its row's label and weight, rows
    without a label have no part. The other arguments: see `Supervised`.

    Ramazanli et al., arXiv 2502.18478. **Its formula was not seen**: this is our reading of its name, of the contrast to
    self-consistency and of our analysis. Balance over groups of the data is another reading of "loss-balanced".
    """

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        alpha: float = 0.1,
        balance: Balance = "convex",
        balance_groups: str | None = None,
        perturbation: MakePerturbation = Perturbation,
        task_weights: Mapping[str, float] | None = None,
        embedding_l2: float = 0.0,
    ) -> None:
        if balance not in get_args(Balance):
            raise UserError(f"objective.balance is {balance!r}", nearest(balance, get_args(Balance)))
        convex = balance == "convex"
        check_key(
            "alpha",
            alpha,
            0 <= alpha <= (1 if convex else math.inf),
            "a number of 0 to 1" if convex else "a number of at least 0",
        )
        super().__init__(schema, alpha, perturbation, task_weights, embedding_l2)
        self.balance, self.balance_groups = balance, balance_groups
        self.num_groups = _count_groups(schema, balance_groups, balance)

    def with_copies(
        self, losses: TaskLosses, clean: Tensor, copies: Tensor, batch: Batch, rows: Tensor
    ) -> tuple[Tensor, str, Tensor]:
        """The loss of the copies against their rows' labels."""
        weight = batch.weight * batch.label_mask
        values, counted = self._row_losses(copies.float(), batch.labels[rows]), weight[rows]  # [k, T]
        if self.balance == "convex":
            value = _mean(values, counted)
            return torch.lerp(losses.per_task, value, self.strength), "perturbed", value
        own = slice(len(clean))
        group = self._groups(batch)
        plain = self._group_means(self._row_losses(clean, batch.labels[own]), weight[own], group[own])
        other = self._group_means(values, counted, group[rows])
        ratio = torch.where(other > 0, plain / other, 1.0).clamp(1 / _LARGEST_RATIO, _LARGEST_RATIO)  # [G, T]
        value, balanced = _mean(torch.cat([values, ratio[group[rows]] * values], 1), counted.repeat(1, 2)).chunk(2)
        return losses.per_task + self.strength * balanced, "perturbed", value

    def _groups(self, batch: Batch) -> Tensor:
        """The group of each row: [B]."""
        if self.balance_groups is None:
            return torch.zeros_like(batch.example_id)
        bag = batch.sparse[self.balance_groups]
        lengths = bag.lengths()
        ids = F.pad(bag.values(), (0, 1))[lengths.cumsum(0) - lengths]  # padded: the last rows may have none
        return torch.where(lengths > 0, ids, self.num_groups - 1)

    def _group_means(self, values: Tensor, weight: Tensor, group: Tensor) -> Tensor:
        """The weighted means over the rows of each group of the joint batch: [G, T], 0 for an empty group (collective)."""
        rows = torch.stack([weight * values.detach(), weight], 1)  # [n, 2, T]
        sums = global_sum(rows.new_zeros(self.num_groups, *rows.shape[1:]).index_add(0, group, rows))
        return sums[:, 0] / or_one(sums[:, 1])


def _count_groups(schema: FeatureSchema, name: str | None, balance: Balance) -> int:
    """The values of a feature, and one more for rows without any."""
    if name is None:
        return 1
    known = [feature.name for feature in schema.unweighted if feature.max_length == 1]
    if name not in known or balance != "ratio":
        raise UserError(
            f"objective.balance_groups is {name!r}: balance=ratio and a sparse feature with max_length 1 are expected",
            nearest(name, known),
        )
    table = next(feature.table for feature in schema.sparse if feature.name == name)
    return schema.table(table).num_embeddings + 1


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    """The weighted mean of each column of [k, T] over the joint batch, this rank's share of it (collective)."""
    return world_size() * (weight * values).sum(0) / or_one(global_sum(weight.sum(0)))
