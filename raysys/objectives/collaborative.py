"""The loss of an ensemble whose members learn from the labels and from each other (CETNet, arXiv 2411.13700)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raysys.errors import UserError, nearest
from raysys.nn.collectives import global_sum, world_size
from raysys.nn.fusion import peer_distance, peer_divergence
from raysys.objectives.supervised import Ranker, Supervised, check_key, or_one
from raysys.schema import FeatureSchema

if TYPE_CHECKING:
    from raysys.data.batch import Batch
    from raysys.models.outputs import Embedded, Output

KL_MODES = ("symmetric", "forward_detached")
_TINY = 1e-20  # of variances: below it errors are all the same


class Collaborative(Supervised):
    """a · L(fused) + (1 - a) · mean_i L(member i) + λ · mean over pairs of J_ij, for each task; then as in `Supervised`.

    J_ij is ½ [KL(p_i ‖ p_j) + KL(p_j ‖ p_i)], for regression tasks ½ (z_i - z_j)². With one member this is `Supervised`.
    The paper's own formulas were not seen: symmetric KL is from a summary by others; a, λ and the ramp are our choice.

    fused_share: a. peer_weight: λ, reached by a line from 0 in the first `ramp` (a share) of the run's steps; it follows
    from the step, so it goes on after a resume. kl_mode: symmetric, or forward_detached: KL(p_j ‖ p_i) + KL(p_i ‖ p_j), each
    with its first distribution held constant (deep mutual learning), gradient p_i - p_j. The others: see `Supervised`.

    Parts to watch, on the joint batch: each member's loss and bias (mean prediction minus mean label) by task, the peer term,
    and how alike members have become: the mean |z_i - z_j|, and the mean correlation of their errors.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        fused_share: float = 0.5,
        peer_weight: float = 0.1,
        ramp: float = 0.05,
        kl_mode: str = "symmetric",
        task_weights: Mapping[str, float] | None = None,
        embedding_l2: float = 0.0,
    ) -> None:
        super().__init__(schema, task_weights=task_weights, embedding_l2=embedding_l2)
        check_key("peer_weight", peer_weight, peer_weight >= 0, "a number of at least 0")
        for key, value in (("fused_share", fused_share), ("ramp", ramp)):
            check_key(key, value, 0 <= value <= 1, "a number from 0 to 1")
        if kl_mode not in KL_MODES:
            raise UserError(f"unknown objective.kl_mode {kl_mode!r}", nearest(kl_mode, KL_MODES))
        self.fused_share, self.peer_weight, self.ramp, self.kl_mode = fused_share, peer_weight, ramp, kl_mode
        self.ramped = 0.0 if ramp > 0 else 1.0  # the share of peer_weight that is in force

    def after_step(self, step: int, total: int) -> None:
        """Where the run stands: `step` of `total` steps are done. Called before the first step, too."""
        self.ramped = min(1.0, step / (self.ramp * total)) if self.ramp > 0 else 1.0

    def forward(self, model: Ranker, batch: Batch, embedded: Embedded) -> tuple[Tensor, Output, dict[str, Tensor]]:
        """Loss (scalar), the model's output, and the parts (detached)."""
        output = model.predict(model.interact(embedded))
        if not output.members:
            raise UserError(
                "objective=collaborative trains the members of an ensemble, and the model has none",
                "take model=cetnet, or objective=supervised",
            )
        fused = self.task_losses(output.logits, batch)
        logits = torch.stack([member.logits for member in output.members.values()]).float()  # [M, B, T]
        means = torch.where(self.binary, logits.sigmoid(), logits)
        share = world_size() * batch.weight * batch.label_mask / or_one(fused.labelled)  # [B, T]
        rows = self._row_losses(logits.flatten(0, 1), batch.labels.repeat(len(logits), 1)).view_as(logits)
        members = (share * rows).sum(1)  # [M, T]
        peers = (share * self._peer_rows(means, logits)).sum(0)  # [T]
        per_task = self.fused_share * fused.per_task + (1 - self.fused_share) * members.mean(0)
        losses = fused._replace(per_task=per_task + self.peer_weight * self.ramped * peers)
        loss, parts = self.add_up(self.weighted(losses), losses, batch, embedded)
        with torch.no_grad():
            errors = means - batch.labels  # [M, B, T]
            parts |= self._by_task("fused", fused.per_task.detach())
            parts |= self._by_task("peers", peers.detach())
            parts |= self._by_task("distance", (share * peer_distance(logits.movedim(0, -1))).sum(0))
            parts |= self._by_task("error_correlation", _correlation(errors, share))
            for place, name in enumerate(output.members):
                parts |= self._by_task(name, members[place].detach())
                parts |= self._by_task(f"{name}.bias", (share * errors[place]).sum(0))
        return loss, output, parts

    def _peer_rows(self, means: Tensor, logits: Tensor) -> Tensor:
        """[M, B, T] → [B, T]."""
        if self.kl_mode == "symmetric":
            return peer_divergence(means.movedim(0, -1), logits.movedim(0, -1))
        return 2 * peer_divergence(means.detach().movedim(0, -1), logits.movedim(0, -1))

    def _by_task(self, name: str, values: Tensor) -> dict[str, Tensor]:
        return {f"{label.name}.{name}": value for label, value in zip(self.labels, values.unbind(), strict=True)}


def _correlation(errors: Tensor, share: Tensor) -> Tensor:
    """The mean over pairs of members of the correlation of their errors [M, B, T] on the joint batch: [T] (collective).

    0 with one member, or where a member's errors are all the same.
    """
    models, weights = len(errors), share / world_size()
    both = (weights * errors[:, None] * errors).sum(2)  # [M, M, T]; not a matmul, which autocast would do in bfloat16
    sums = global_sum(torch.cat([both, (weights * errors).sum(1)[None]]))  # [M + 1, M, T]
    product, mean = sums[:-1], sums[-1]
    covariance = product - mean[:, None] * mean
    deviation = covariance.diagonal().clamp(min=0).sqrt().t()  # [M, T]
    scale = deviation[:, None] * deviation
    correlation = torch.where(scale > _TINY, covariance / scale.clamp(min=_TINY), 0.0).clamp(-1, 1)
    pairs = correlation.sum((0, 1)) - correlation.diagonal().sum(1)
    return pairs / max(models * (models - 1), 1)
