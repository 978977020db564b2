"""UKDSL: rows that were ranked and not shown teach too, with the logged predictions of a stronger model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raysys.errors import UserError, nearest
from raysys.nn.collectives import global_sum, world_size
from raysys.nn.listwise import listwise_cross_entropy
from raysys.nn.mlp import MLP, linear
from raysys.nn.random import seeded
from raysys.objectives.supervised import Ranker, Supervised, check_key, or_one
from raysys.objectives.teacher_shift import TeacherShift
from raysys.schema import FeatureSchema

if TYPE_CHECKING:
    from raysys.data.batch import Batch
    from raysys.models.outputs import Embedded, Output

HeadMode = Literal["shared", "aux"]
TeacherLoss = Literal["bce", "mse_logit", "listwise"]
_CLIP = 1e-6


class UKDSL(Supervised):
    """The supervised loss on rows with a label, and a teacher's probabilities p on rows without: not shown, hence no negatives.

        shared:  Σ_L w [(1 - a) l(f, y) + a l(f, p)] / Σ_L w  +  b · Σ_U u l(f, p) / Σ_U u
        aux:     Σ_L w l(f, y) / Σ_L w  +  b · (Σ_L w l(g, p) + Σ_U u l(g, p)) / (Σ_L w + Σ_U u)

    for each task. L: rows with its label. U: real rows without it, where the teacher spoke. A row without a teacher (null)
    learns from its label alone, or not at all. Metrics see rows with a label only, as ever.

    teachers: column (a float `extra` of the schema, probabilities) by binary task. It must mean the same event as the task;
        where it does not, use aux.
    sampling_weight: a float `extra`, u = 1 / the rate at which unlabelled rows were kept (None, or null in a row: 1).
    labeled_share: a. unlabeled_weight: b. temperature: of both logits, the loss times its square.
    loss: bce; mse_logit, the squared difference of logits; or listwise, which puts b · the mean over requests (`group_id`) of
        the cross-entropy between softmax(logit p) and softmax(f) in place of the mean over rows. Its list is all rows of
        the request where the teacher spoke, shown or not, each with its u. It knows the order of a request and
        nothing of the level, which labels have to teach (or take aux); a batch needs whole requests. Probabilities are
        clipped to 1e-6 from 0 and 1 where a logit is taken of them.
    teacher_rank: an int `extra`, a row's rank in the stage of the teacher: corrects the teacher by bucket of rank (see
        `TeacherShift`; rank_buckets: the last rank of each bucket but the last). None takes it as it is.
    head_mode: shared, or aux: an auxiliary head g on `Output.shared` shields the model's own from the teacher's errors; it
        is trained and checkpointed with the objective, and never exported. shared_width: the columns of `Output.shared`;
        aux_hidden: hidden widths of g.

    Eghbalzadeh et al., arXiv 2502.06834. The three parts of the method are the paper's; **all formulas, the sampling and the
    head modes are our reading** (standard distillation), its hyperparameters were not seen. Rows in both streams are to be
    removed before: a shown one has a label. Teachers age: drop rows that an older one has scored.
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
        teacher_rank: str | None = None,
        rank_buckets: Sequence[int] = (1, 5, 20, 100),
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
        check_key("labeled_share", labeled_share, 0 <= labeled_share <= 1, "a number of 0 to 1")
        check_key("unlabeled_weight", unlabeled_weight, unlabeled_weight >= 0, "a number of at least 0")
        check_key("temperature", temperature, temperature > 0, "a number above 0")
        if loss == "listwise" and (schema.group_id is None or labeled_share > 0):
            raise UserError(
                f"objective.loss=listwise needs a group_id in {schema.source}, and labeled_share 0",
                "name the column of the requests; a labelled row learns from its label and in its list",
            )
        self.teachers = {task: teachers[task] for task in schema.tasks if task in teachers}
        """The teacher's column by task; evaluation compares the model with it."""
        self.tasks = [place for place, task in enumerate(schema.tasks) if task in teachers]
        self.sampling_weight = sampling_weight
        self.labeled_share, self.unlabeled_weight = labeled_share, unlabeled_weight
        self.temperature, self.loss, self.shared_width = temperature, loss, shared_width
        self.whole_groups = loss == "listwise"
        """Whether a batch must have all rows of a request (`data.keep_groups_whole`)."""
        self.teacher_rank, self.shift = teacher_rank, None
        if teacher_rank is not None:
            _check_rank(schema, teacher_rank)
            self.shift = TeacherShift(rank_buckets, len(self.tasks))
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
            loss, parts = self.add_up(self.weighted(losses), losses, batch, embedded)
            return loss, output, parts
        teacher, spoke = self._teacher(batch)
        labeled = batch.label_mask[:, self.tasks]
        own = output.logits[:, self.tasks].float()
        weight = self._teacher_weight(batch, labeled) * spoke
        taught = own if self.aux is None else self._aux_logits(output.shared)
        bias = taught.sigmoid() - teacher
        if self.loss == "listwise":
            means = torch.stack([self._listwise(taught, teacher, batch, weight), *self._means(bias[None], weight)])
        else:
            means = self._means(torch.stack([self._distance(taught, teacher), bias]), weight)  # [2, K]
        per_task = losses.per_task.index_add(0, self._places(own), self.unlabeled_weight * means[0])
        if self.labeled_share > 0:
            change = self._labeled_change(own, teacher, spoke, batch) / or_one(losses.labelled[self.tasks])
            per_task = per_task.index_add(0, self._places(own), self.labeled_share * change)
        loss, parts = self.add_up(self.weighted(losses._replace(per_task=per_task)), losses, batch, embedded)
        for name, values in zip(("teacher", "teacher_bias"), means.detach(), strict=True):
            parts |= {f"{self.labels[task].name}_{name}": value for task, value in zip(self.tasks, values, strict=True)}
        return loss, output, parts

    def _teacher(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The teacher's probabilities [B, K], corrected, ½ where it did not speak; and where it spoke."""
        teacher = torch.stack([self._extra(batch, column) for column in self.teachers.values()], 1)
        spoke = ~teacher.isnan()
        teacher = torch.where(spoke, teacher, 0.5)
        if self.shift is not None and self.teacher_rank is not None:
            rank, weight = batch.extra[self.teacher_rank], (batch.weight * batch.label_mask)[:, self.tasks] * spoke
            assert isinstance(rank, Tensor)
            teacher = self.shift(teacher, rank, batch.labels[:, self.tasks], weight)
        return teacher, spoke

    def _labeled_change(self, logits: Tensor, teacher: Tensor, spoke: Tensor, batch: Batch) -> Tensor:
        """Σ w (l(f, p) - l(f, y)) of this rank's labelled rows where the teacher spoke, times the number of ranks: [K]."""
        labels, weight = batch.labels[:, self.tasks], (batch.weight * batch.label_mask)[:, self.tasks]
        hard = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return world_size() * (weight * spoke * (self._distance(logits, teacher) - hard)).sum(0)

    def _teacher_weight(self, batch: Batch, labeled: Tensor) -> Tensor:
        """[B, K]: u on unlabelled rows; on labelled ones their weight under aux, u in lists, else 0; 0 for padding."""
        real = (batch.example_id >= 0).float()[:, None]
        unlabeled = real
        if self.sampling_weight is not None:
            unlabeled = real * self._extra(batch, self.sampling_weight).nan_to_num(nan=1.0)[:, None]
        if self.loss == "listwise":
            return unlabeled.expand_as(labeled)
        kept = batch.weight[:, self.tasks] if self.aux is not None else torch.zeros_like(real)
        return torch.where(labeled, kept, unlabeled)

    def _distance(self, logits: Tensor, teacher: Tensor) -> Tensor:
        """The loss of student logits against the teacher's probabilities, elementwise."""
        if self.loss == "bce" and self.temperature == 1:
            return F.binary_cross_entropy_with_logits(logits, teacher, reduction="none")
        target, student = self._scores(teacher), logits / self.temperature
        if self.loss == "mse_logit":
            return self.temperature**2 * (student - target).square()
        return self.temperature**2 * F.binary_cross_entropy_with_logits(student, target.sigmoid(), reduction="none")

    def _listwise(self, logits: Tensor, teacher: Tensor, batch: Batch, weight: Tensor) -> Tensor:
        """The loss of each task over lists, this rank's share of it: [K] (collective)."""
        student, target = logits / self.temperature, self._scores(teacher)
        return self.temperature**2 * listwise_cross_entropy(student, target, batch.group_id, weight)

    def _scores(self, teacher: Tensor) -> Tensor:
        """The teacher's logits over the temperature."""
        return teacher.clamp(_CLIP, 1 - _CLIP).logit() / self.temperature

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
        """The weighted means over the rows of the joint batch, this rank's share: [n, B, K] → [n, K] (collective)."""
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


def _check_rank(schema: FeatureSchema, column: str) -> None:
    known = [extra.name for extra in schema.extra if extra.kind == "int"]
    if column not in known:
        raise UserError(
            f"objective.teacher_rank: no int column {column!r} in extra of {schema.source}", nearest(column, known)
        )
