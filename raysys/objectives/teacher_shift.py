"""A correction of a teacher that is too sure of what it chose itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raysys.errors import UserError
from raysys.nn.collectives import global_sum

_CLIP = 1e-6
_PRIOR = 1.0  # curvature at the start: the weight of four rows at p = ½ that say "no shift"
_LARGEST_STEP = 1.0


class TeacherShift(nn.Module):
    """p → s(logit p + d) with one d for each task and bucket of stage rank, so that p is right on the bucket's impressions.

    d solves Σ w (y - s(logit p + d)) = 0 over labelled rows where the teacher spoke. It is found during training: a Newton
    step per batch with the curvature of all batches so far, at most 1 long. So it settles as 1 / rows does and does
    not follow a teacher that changes. A bucket without impressions keeps its teacher as it is. d is checkpointed.

    edges: the last rank of each bucket but the last one, which has no end.

    Ours, for what arXiv 2502.06834 says of funnels: selection by a score raises the mean error of the scores selected, the
    more the fewer are selected.
    """

    edges: Tensor
    shift: Tensor
    curvature: Tensor

    def __init__(self, edges: Sequence[int], tasks: int) -> None:
        super().__init__()
        if list(edges) != sorted(set(edges)) or not edges:
            raise UserError(f"objective.rank_buckets is {list(edges)}", "ranks that rise, such as [1, 5, 20]")
        self.register_buffer("edges", torch.tensor(list(edges)), persistent=False)
        self.register_buffer("shift", torch.zeros(len(edges) + 1, tasks, dtype=torch.float64))
        self.register_buffer("curvature", torch.full((len(edges) + 1, tasks), _PRIOR, dtype=torch.float64))

    @torch.no_grad()
    def forward(self, teacher: Tensor, rank: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        """The probabilities [B, K] corrected, after a step of d (collective; none in evaluation mode).

        rank: [B]. labels, weight: [B, K], weight 0 where there is no label or no teacher.
        """
        bucket = torch.bucketize(rank, self.edges)
        logits = teacher.double().clamp(_CLIP, 1 - _CLIP).logit()
        if self.training:
            p = (logits + self.shift[bucket]).sigmoid()
            rows = torch.stack([weight * (labels - p), weight * p * (1 - p)], 1)  # [B, 2, K]
            sums = rows.new_zeros(len(self.shift), *rows.shape[1:]).index_add(0, bucket, rows)
            gradient, curvature = global_sum(sums).unbind(1)
            self.curvature += curvature
            self.shift += (gradient / self.curvature).clamp(-_LARGEST_STEP, _LARGEST_STEP)
        return (logits + self.shift[bucket]).sigmoid().to(teacher.dtype)
