"""UKDSL: rows that were ranked and not shown teach too, with the logged predictions of a stronger model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raysys.errors import UserError, nearest
from raysys.nn.collectives import global_sum, world_size
from raysys.nn.mlp import MLP, linear
from raysys.nn.random import seeded
from raysys.objectives.supervised import Ranker, Supervised, or_one
from raysys.schema import FeatureSchema

if TYPE_CHECKING:
    from raysys.data.batch import Batch
    from raysys.models.outputs import Embedded, Output

HeadMode = Literal["shared", "aux"]
TeacherLoss = Literal["bce", "mse_logit"]
_CLIP = 1e-6


class UKDSL(Supervised):
    """The supervised loss on rows with a label, and a teacher's probabilities p on rows without: not shown, hence no negatives.

        shared:  Σ_L w [(1 - a) l(f, y) + a l(f, p)] / Σ_L w  +  b · Σ_U u l(f, p) / Σ_U u
        aux:     Σ_L w l(f, y) / Σ_L w  +  b · (Σ_L w l(g, p) + Σ_U u l(g, p)) / (Σ_L w + Σ_U u)

    for each task. L: rows with its label. U: real rows without it, where the teacher spoke. A row without a teacher (null)
    learns from its label alone, or not at all. Metrics see rows with a label only, as ever.

    teachers: column (a float `extra` of the schema, probabilities) by binary task. It must mean the same event as the task;
        where it does not, use aux.
    sampling_weight: a float `extra`, u = 1 / the rate at which unlabelled rows were kept (None: 1).
    labeled_share: a. unlabeled_weight: b. temperature: of both logits, the loss times its square.
    loss: bce, or mse_logit, the squared difference of logits; probabilities are clipped to 1e-6 from 0 and 1 where a logit
        is taken of them.
    head_mode: shared, or aux: an auxiliary head g on `Output.shared` shields the model's own from the teacher's errors; it
        is trained and checkpointed with the objective, and never exported. shared_width: the columns of `Output.shared`;
        aux_hidden: hidden widths of g.

    Eghbalzadeh et al., arXiv 2502.06834. The three parts of the method are the paper's; **all formulas, the sampling and the
    head modes are our reading** (standard distillation), its hyperparameters were not seen. Not offered: losses within
    a request, and a correction of the teacher's own bias. Rows in both streams are to be removed before: a shown one has
    a label. Teachers age: drop rows that an older one has scored.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        teachers: Mapping[str, str],
        sampling_weight: str | None = None,
        labeled_share: float = 0.0,
        unlabeled_weight: float = 1.0,
        temperature: float = 1.0,
        loss: TeacherLoss = "bce",
        head_mode: HeadMode = "shared",
        shared_width: int | None = None,
        aux_hidden: Sequence[int] = (64,),
        task_weights: Mapping[str, float] | None = None,
        embedding_l2: float = 0.0,
    ) -> None:
        super().__init__(schema, task_weights=task_weights, embedding_l2=embedding_l2)
        check_columns(schema, teachers, sampling_weight)
        for key, value, options in (
            ("loss", loss, get_args(TeacherLoss)),
            ("head_mode", head_mode, get_args(HeadMode)),
        ):
            if value not in options:
                raise UserError(f"objective.{key} is {value!r}", nearest(value, options))
        for key, number, fits, expected in (
            ("labeled_share", labeled_share, 0 <= labeled_share <= 1, "of 0 to 1"),
            ("unlabeled_weight", unlabeled_weight, unlabeled_weight >= 0, "of at least 0"),
            ("temperature", temperature, temperature > 0, "above 0"),
        ):
            if not fits:
                raise UserError(f"objective.{key} is {number}", f"a number {expected} is expected")
        self.tasks = [place for place, task in enumerate(schema.tasks) if task in teachers]
        self.columns = [teachers[schema.tasks[place]] for place in self.tasks]
        self.sampling_weight, self.labeled_share, self.unlabeled_weight = (
            sampling_weight,
            labeled_share,
            unlabeled_weight,
        )
        self.temperature, self.loss, self.shared_width = temperature, loss, shared_width
        self.aux: nn.Sequential | None = None
        if head_mode == "aux":
            if shared_width is None or labeled_share > 0:
                raise UserError(
                    "objective.head_mode=aux needs objective.shared_width, and labeled_share 0",
                    "the width of what the model's interact returns; the teacher is learned by the auxiliary head alone",
                )
            with seeded(0, "ukdsl"):
                mlp = MLP(shared_width, aux_hidden)
                self.aux = nn.Sequential(mlp, linear(mlp.out_features, len(self.tasks)))

    def forward(self, model: Ranker, batch: Batch, embedded: Embedded) -> tuple[Tensor, Output, dict[str, Tensor]]:
        """As `Supervised.forward`; parts `TASK_teacher`, the loss b weighs, and `TASK_teacher_bias`, mean s(f) - p there."""
        output = model.predict(model.interact(embedded))
        losses = self.task_losses(output.logits, batch)
        if not self.tasks or (self.unlabeled_weight == 0 and self.labeled_share == 0):
            loss, parts = self.add_up(self.weighted(losses), losses, embedded)
            return loss, output, parts
        teacher = torch.stack([self._extra(batch, column) for column in self.columns], 1)  # [B, K]
        spoke = ~teacher.isnan()
        teacher = torch.where(spoke, teacher, 0.5)
        labeled = batch.label_mask[:, self.tasks]
        own = output.logits[:, self.tasks].float()
        weight = self._teacher_weight(batch, labeled) * spoke
        taught = own if self.aux is None else self._aux_logits(output.shared)
        means = self._means(
            torch.stack([self._distance(taught, teacher), taught.sigmoid() - teacher]), weight
        )  # [2, K]
        per_task = losses.per_task.index_add(0, self._places(own), self.unlabeled_weight * means[0])
        if self.labeled_share > 0:
            shift = self.labeled_share * self._shift(own, teacher, spoke, batch) / or_one(losses.labelled[self.tasks])
            per_task = per_task.index_add(0, self._places(own), shift)
        loss, parts = self.add_up(self.weighted(losses._replace(per_task=per_task)), losses, embedded)
        for name, values in zip(("teacher", "teacher_bias"), means.detach(), strict=True):
            parts |= {f"{self.labels[task].name}_{name}": value for task, value in zip(self.tasks, values, strict=True)}
        return loss, output, parts

    def _shift(self, logits: Tensor, teacher: Tensor, spoke: Tensor, batch: Batch) -> Tensor:
        """Σ w (l(f, p) - l(f, y)) of this rank's labelled rows where the teacher spoke, times the number of ranks: [K]."""
        labels, weight = batch.labels[:, self.tasks], (batch.weight * batch.label_mask)[:, self.tasks]
        hard = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return world_size() * (weight * spoke * (self._distance(logits, teacher) - hard)).sum(0)

    def _teacher_weight(self, batch: Batch, labeled: Tensor) -> Tensor:
        """[B, K]: u on unlabelled rows; on labelled ones their weight under aux, else 0; 0 for padding."""
        real = (batch.example_id >= 0).float()[:, None]
        unlabeled = real if self.sampling_weight is None else real * self._extra(batch, self.sampling_weight)[:, None]
        kept = batch.weight[:, self.tasks] if self.aux is not None else torch.zeros_like(real)
        return torch.where(labeled, kept, unlabeled)

    def _distance(self, logits: Tensor, teacher: Tensor) -> Tensor:
        """The loss of student logits against the teacher's probabilities, elementwise."""
        if self.loss == "bce" and self.temperature == 1:
            return F.binary_cross_entropy_with_logits(logits, teacher, reduction="none")
        target, student = teacher.clamp(_CLIP, 1 - _CLIP).logit() / self.temperature, logits / self.temperature
        if self.loss == "mse_logit":
            return self.temperature**2 * (student - target).square()
        return self.temperature**2 * F.binary_cross_entropy_with_logits(student, target.sigmoid(), reduction="none")

    def _aux_logits(self, shared: Tensor) -> Tensor:
        assert self.aux is not None
        if shared.shape[1] != self.shared_width:
            raise UserError(
                f"objective.shared_width is {self.shared_width}, and the model's interact returns {shared.shape[1]} columns",
                f"objective.shared_width={shared.shape[1]}",
            )
        logits: Tensor = self.aux(shared)
        return logits.float()

    def _means(self, values: Tensor, weight: Tensor) -> Tensor:
        """The weighted means over the rows of the joint batch, this rank's share: [2, B, K] → [2, K] (collective)."""
        return world_size() * (weight * values).sum(1) / or_one(global_sum(weight.sum(0)))

    def _places(self, like: Tensor) -> Tensor:
        return torch.tensor(self.tasks, device=like.device)

    @staticmethod
    def _extra(batch: Batch, column: str) -> Tensor:
        value = batch.extra[column]
        assert isinstance(value, Tensor)
        return value.detach().float()


def check_columns(schema: FeatureSchema, teachers: Mapping[str, str], sampling_weight: str | None = None) -> None:
    """Raise a `UserError` where a teacher's task is not binary, or a column is no float extra of the schema."""
    columns = [extra.name for extra in schema.extra if extra.kind == "float"]
    kinds = {label.name: label.kind for label in schema.labels}
    if not teachers:
        raise UserError(
            "objective.teachers names no task", "teachers={TASK: COLUMN}, a float column of the schema's extra"
        )
    for task in teachers:
        if kinds.get(task) != "binary":
            raise UserError(
                f"objective.teachers: no binary task {task!r} in {schema.source}",
                nearest(task, [name for name, kind in kinds.items() if kind == "binary"]),
            )
    for key, column in [
        *((f"teachers.{task}", name) for task, name in teachers.items()),
        ("sampling_weight", sampling_weight),
    ]:
        if column is not None and column not in columns:
            raise UserError(
                f"objective.{key}: no float column {column!r} in extra of {schema.source}", nearest(column, columns)
            )
