"""Losses over the candidates of one request, for rows of many requests one after another."""

from __future__ import annotations

import torch
from torch import Tensor

from raysys.nn.collectives import global_sum, world_size

_ROUNDING = 1e-5  # of float32 values, relative to their size


def listwise_cross_entropy(student: Tensor, teacher: Tensor, request: Tensor, weight: Tensor) -> Tensor:
    """The mean over requests of -Σ_i P_i log Q_i, P = softmax(teacher) and Q = softmax(student) within the request.

    student, teacher, weight: [R], or [R, K] for K losses at once; teacher and student are scores, of which the softmax is
    taken here, and no gradient reaches the teacher. request: [R] ids, in any order; all rows of a request must be on one
    rank (`data.keep_groups_whole`). weight: 0 leaves a row out; else every row counts weight times in its softmax, as for
    candidates that were kept at a rate of 1 / weight. Requests with fewer than two rows say nothing and are not counted.

    Returns this rank's share of the loss of the joint batch, as `Supervised` does: its average over ranks is the mean over
    all their requests. A scalar, or [K]; 0 where there is no request (collective). It is least, the entropy of P, where student
    and teacher differ by a constant within each request; the gradient of a student's score is (Q_i - P_i) / requests, with
    weights (w_i exp(student_i) / Σ w exp(student) - P_i) / requests.
    """
    groups, place = request.unique(return_inverse=True)
    count = len(groups)

    def total(values: Tensor) -> Tensor:
        """Sums by request: [R, …] → [G, …]."""
        return values.new_zeros(count, *values.shape[1:]).index_add(0, place, values)

    def log_softmax(scores: Tensor) -> Tensor:
        """The logarithm of each row's share of Σ weight · exp(score) of its request, without its own weight."""
        scores = scores.float()
        rows = place.view(-1, *[1] * (scores.dim() - 1)).expand_as(scores)
        known = scores.detach().masked_fill(~kept, -torch.inf)
        top = known.new_full((count, *known.shape[1:]), -torch.inf).scatter_reduce(0, rows, known, "amax")
        scores = torch.where(kept, scores - top[place], 0.0)  # at most 0: exp does not overflow
        sums = total(weight * scores.exp())
        return scores - torch.where(sums > 0, sums, 1.0).log()[place]

    weight = weight.float()
    kept = weight > 0
    share = weight * log_softmax(teacher.detach()).exp()  # P, which adds up to 1
    losses = -total(share * log_softmax(student))  # [G, …]
    counted = (total(kept.float()) > 1).float()
    return world_size() * (counted * losses).sum(0) / global_sum(counted.sum(0)).clamp(min=1)


def deviation_within(values: Tensor, request: Tensor, weight: Tensor) -> Tensor:
    """[R] the deviation of a request's values, for each of its rows; 0 where they differ by rounding only.

    values, weight: [R], weights are of rows as above; request: [R] ids, in any order.
    """
    groups, place = request.unique(return_inverse=True)

    def mean(values: Tensor) -> Tensor:
        """Weighted means by request [G], and 0 where no row counts."""
        sums = [weight.new_zeros(len(groups)).index_add(0, place, part) for part in (weight * values, weight)]
        return sums[0] / torch.where(sums[1] > 0, sums[1], 1.0)

    deviation = mean((values - mean(values)[place]).square()).sqrt()
    return torch.where(deviation > _ROUNDING * mean(values.abs()), deviation, 0.0)[place]
