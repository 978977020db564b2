"""The loss of an early ranking stage: what users did, what the final stage predicts, and the order that it would give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from raysys.errors import UserError, nearest
from raysys.models.value import Value
from raysys.nn.collectives import global_sum, world_size
from raysys.nn.listwise import deviation_within, listwise_cross_entropy
from raysys.objectives.supervised import Ranker, Supervised, check_key, or_one
from raysys.objectives.ukdsl import check_columns
from raysys.schema import FeatureSchema

if TYPE_CHECKING:
    from raysys.data.batch import Batch
    from raysys.models.outputs import Embedded, Output


class EarlyStageLoss(Supervised):
    """Σ_t c_t [(1 - a_t) · mean over impressions of l(z_t, y_t) + a_t · mean over scored rows of l(z_t, P_F(t))] + g · L_rank.

    l is the cross-entropy of a logit. Impressions: rows with the task's label. Scored rows: those where the final stage's
    probability P_F was logged, shown or not; nothing flows into it. A row may be both. A task without a column in
    `teachers` has a_t = 0, and c_t is its entry in `task_weights`.

    L_rank = mean over requests of -Σ_i softmax(V_F / (tau s))_i log softmax(V_E / (tau s))_i over the scored rows of a request
    (one `group_id`), V the `value` with P_F and with the early probabilities, s the deviation of V_F within the request.
    Its gradient is 0 where V_E is V_F and a constant, and bids and event weights are trained into the model. A request
    on which V_F is constant teaches nothing. It needs whole requests in a batch: `data.keep_groups_whole`.

    teachers: column (a float `extra`, probabilities) by binary task. soft_share: a_t by task; where none is named 1 for an
    event of `value` (rare, so labels are few) and 0.5 otherwise. value, bid: the formula, and the float `extra` with bids.
    rank_weight: g. temperature: tau.

    After Wang et al. (2023, arXiv 2307.11096), of which only the abstract was seen: **the loss and all defaults are ours**.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        teachers: Mapping[str, str],
        soft_share: Mapping[str, float] | None = None,
        value: Value | None = None,
        bid: str | None = None,
        rank_weight: float = 0.0,
        temperature: float = 1.0,
        task_weights: Mapping[str, float] | None = None,
        embedding_l2: float = 0.0,
    ) -> None:
        super().__init__(schema, task_weights=task_weights, embedding_l2=embedding_l2)
        check_columns(schema, teachers)
        self.tasks = [place for place, task in enumerate(schema.tasks) if task in teachers]
        self.teachers = {task: teachers[task] for task in schema.tasks if task in teachers}
        """The final stage's column by task; evaluation compares the model with it."""
        value = value or Value()
        value.check(schema, "objective.value")
        shares = {task: 1.0 if task in value.events else 0.5 for task in self.teachers} | dict(soft_share or {})
        for task, share in shares.items():
            if task not in self.teachers:
                raise UserError(f"objective.soft_share: {task!r} has no teacher", nearest(task, self.teachers))
            check_key(f"soft_share.{task}", share, 0 <= share <= 1, "a number of 0 to 1")
        self.soft_share = [float(shares[task]) for task in self.teachers]
        check_key("rank_weight", rank_weight, rank_weight >= 0, "a number of at least 0")
        check_key("temperature", temperature, temperature > 0, "a number above 0")
        if rank_weight > 0:
            _check_ranking(schema, value, bid, self.teachers)
        self.value, self.bid, self.rank_weight, self.temperature = value, bid, rank_weight, temperature
        self.whole_groups = rank_weight > 0
        """Whether a batch must have all rows of a request (`data.keep_groups_whole`)."""

    def forward(self, model: Ranker, batch: Batch, embedded: Embedded) -> tuple[Tensor, Output, dict[str, Tensor]]:
        """As `Supervised.forward`; parts `TASK_soft`, the loss a_t weighs, `TASK_soft_bias`, mean P_E - P_F, and `rank`."""
        output = model.predict(model.interact(embedded))
        losses = self.task_losses(output.logits, batch)
        final = torch.stack([_extra(batch, column) for column in self.teachers.values()], 1)  # [B, K]
        spoke = ~final.isnan() & (batch.example_id >= 0)[:, None]
        final, logits = torch.where(spoke, final, 0.5), output.logits[:, self.tasks].float()
        early = logits.sigmoid()
        rows = F.binary_cross_entropy_with_logits(logits, final, reduction="none")
        sums = (spoke * torch.stack([rows, early - final])).sum(1)  # [2, K]
        soft = world_size() * sums / or_one(global_sum(spoke.sum(0).to(sums.dtype)))
        rank = self._ranking(early, final, spoke, batch) if self.rank_weight > 0 else rows.new_zeros(())
        share, places = rows.new_tensor(self.soft_share), torch.tensor(self.tasks, device=rows.device)
        change = share * (soft[0] - losses.per_task[places])
        mixed = losses._replace(per_task=losses.per_task.index_add(0, places, change))
        loss, parts = self.add_up(self.weighted(mixed) + self.rank_weight * rank, losses, batch, embedded)
        for name, values in zip(("soft", "soft_bias"), soft.detach(), strict=True):
            parts |= {f"{task}_{name}": value for task, value in zip(self.teachers, values, strict=True)}
        return loss, output, parts | ({"rank": rank.detach()} if self.rank_weight > 0 else {})

    def _ranking(self, early: Tensor, final: Tensor, spoke: Tensor, batch: Batch) -> Tensor:
        """This rank's share of L_rank (collective)."""
        assert self.bid is not None
        places = {task: place for place, task in enumerate(self.teachers)}
        bid = _extra(batch, self.bid)
        read = spoke[:, [places[task] for task in self.value.tasks]].all(1) & ~bid.isnan()
        bid = torch.where(read, bid, 0.0)
        value_final, value_early = (
            self.value(bid, {task: p[:, place] for task, place in places.items()}) for p in (final, early)
        )
        deviation = deviation_within(value_final, batch.group_id, read.float())
        scale = self.temperature * torch.where(deviation > 0, deviation, 1.0)
        weight = (read & (deviation > 0)).float()
        return listwise_cross_entropy(value_early / scale, value_final / scale, batch.group_id, weight)


def _extra(batch: Batch, column: str) -> Tensor:
    value = batch.extra[column]
    assert isinstance(value, Tensor)
    return value.detach().float()


def _check_ranking(schema: FeatureSchema, value: Value, bid: str | None, columns: Mapping[str, str]) -> None:
    """What L_rank needs."""
    floats = [extra.name for extra in schema.extra if extra.kind == "float"]
    if bid not in floats:
        raise UserError(
            f"objective.bid: no float column {bid!r} in extra of {schema.source}", nearest(str(bid), floats)
        )
    for task in value.tasks:
        if task not in columns:
            raise UserError(f"objective.rank_weight is above 0, and {task!r} has no teacher", "name it in teachers")
    if not value.tasks:
        raise UserError(
            "objective.rank_weight is above 0, and value reads no task", "give value.factors or value.events"
        )
    if schema.group_id is None:
        raise UserError(f"{schema.source}: no group_id, which tells requests apart", "name the column of the requests")
