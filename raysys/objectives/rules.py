"""How much of each task's gradient goes into one direction, from nothing but their inner products.

With gradients g_1 … g_T and Gram matrix M_ij = ⟨g_i, g_j⟩ each function gives weights w [T]; the direction is Σ w_i g_i and
its squared norm wᵀ M w. Everything stays on the device, without a wait for it; float64 is expected. `active` [T] says
which tasks take part: one without labels in a batch has g = 0, which min-norm would otherwise choose alone.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from raysys.nn.random import hash64

_EXACT_TASKS = 8  # up to so many tasks all 2^T - 1 sets of tasks are tried
_ITERATIONS = 500
_RIDGE = 1e-10  # of the largest diagonal entry: decides between solutions of the same norm (identical tasks)


def min_norm(gram: Tensor, active: Tensor, rounding: float = 0.0) -> Tensor:
    """argmin over the simplex of active tasks of wᵀ M w: MGDA (Désidéri 2012). [T], all 0 where no task is active.

    Exact up to 8 tasks: on the right set of tasks w is M⁻¹ 1 over its sum, so all sets are solved in one batch and the
    feasible one of least norm is taken. Beyond that, accelerated projected gradient. rounding: relative error of the
    entries of M, of which gradients that (nearly) depend on each other would otherwise make a negative norm.
    """
    largest = gram.diagonal().max().clamp(min=torch.finfo(gram.dtype).tiny)
    gram = gram / largest
    gram = gram + torch.diag(rounding * gram.diagonal() + _RIDGE)
    return _on_supports(gram, active) if len(gram) <= _EXACT_TASKS else _projected_gradient(gram, active)


def _on_supports(gram: Tensor, active: Tensor) -> Tensor:
    supports = _supports(len(gram)).to(gram)  # [2^T - 1, T]
    pairs = supports[:, :, None] * supports[:, None, :]
    systems = pairs * gram + torch.diag_embed(1 - supports)
    solution, _ = torch.linalg.solve_ex(
        systems, supports
    )  # [2^T - 1, T], M_SS⁻¹ 1; the least norm² on S is 1 / its sum
    total = solution.sum(1)
    feasible = (solution >= -1e-9 * total[:, None]).all(1) & (total > 0) & ~(supports.bool() & ~active).any(1)
    best = torch.where(feasible, total, -torch.inf).argmax()
    weights = solution.index_select(0, best[None])[0].clamp(min=0)
    return torch.where(active, weights / weights.sum(), 0.0)


@lru_cache
def _supports(num_tasks: int) -> Tensor:
    """All sets of tasks but the empty one, as rows of 0 and 1."""
    return (torch.arange(1, 2**num_tasks)[:, None] >> torch.arange(num_tasks)) & 1


def _projected_gradient(gram: Tensor, active: Tensor) -> Tensor:
    one = torch.ones((), dtype=gram.dtype, device=gram.device)
    step = 1 / torch.linalg.matrix_norm(gram)  # the Frobenius norm bounds the largest eigenvalue
    weights = ahead = active.to(gram) / active.sum().clamp(min=1)
    since = torch.zeros_like(one)  # the last restart: momentum that points uphill is dropped
    for _ in range(_ITERATIONS):
        before, weights = weights, project_simplex(ahead - step * (gram @ ahead), active, one)
        since = torch.where((ahead - weights) @ (weights - before) > 0, 0.0, since + 1)
        ahead = weights + since / (since + 3) * (weights - before)
    return weights


def project_simplex(point: Tensor, active: Tensor, mass: Tensor) -> Tensor:
    """The nearest w to `point` [T] with w >= 0 and Σ w = mass, 0 where not active."""
    ordered = torch.where(active, point, -torch.inf).sort(descending=True).values
    counts = torch.arange(1, len(point) + 1, device=point.device)
    shifts = (ordered.cumsum(0) - mass) / counts  # -inf beyond the active ones
    last = ((ordered > shifts) & ordered.isfinite()).sum().clamp(min=1) - 1
    return torch.where(active, (point - shifts.index_select(0, last[None])).clamp(min=0), 0.0)


def moco_step(weights: Tensor, gram: Tensor, active: Tensor, gamma: Tensor | float, rho: float) -> Tensor:
    """One step of MoCo's recurrence (Fernando et al. 2023): Proj_simplex(w - gamma (M + rho I) w) → [T].

    Tasks that are not active keep their part of the simplex.
    """
    mass = torch.where(active, weights, 0.0).sum()
    moved = weights - gamma * (gram @ weights + rho * weights)
    return torch.where(active, project_simplex(moved, active, mass), weights)


def uniform(active: Tensor) -> Tensor:
    """The same for every active task, with sum 1."""
    return active.double() / active.sum().clamp(min=1)


def pcgrad(gram: Tensor, order: Tensor) -> Tensor:
    """PCGrad (Yu et al. 2020): each gradient loses its component along those it conflicts with, then all are added. [T].

    order: [T, T], in row t the tasks in the order in which g_t is compared with them.
    """
    own = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    parts = own  # [T, T], row t: what p_t is made of
    norms = gram.diagonal()
    for others in order.unbind(1):  # [T]
        onto = own.index_select(0, others)  # [T, T]
        product = (parts @ gram * onto).sum(1)  # ⟨p_t, g_k⟩
        norm = norms.index_select(0, others)
        is_self = others == torch.arange(len(gram), device=gram.device)
        conflict = (product < 0) & (norm > 0) & ~is_self
        parts = parts - torch.where(conflict, product / norm, 0.0)[:, None] * onto
    return parts.sum(0)


def random_orders(step: Tensor, num_tasks: int, seed: int) -> Tensor:
    """A permutation of the tasks for each task, [T, T]: a hash of (seed, step), so the same on every rank and after a resume."""
    place = torch.arange(num_tasks**2, device=step.device) + (step + 1) * num_tasks**2 + hash64(f"pcgrad/{seed}")
    mixed = place * 0x1E3779B97F4A7C15
    mixed = (mixed ^ (mixed >> 29)) * 0x3F58476D1CE4E5B9
    mixed = (mixed ^ (mixed >> 32)) * 0x14D049BB133111EB
    return (mixed ^ (mixed >> 31)).view(num_tasks, num_tasks).argsort(1)


def gradnorm_step(weights: Tensor, norms: Tensor, rates: Tensor, active: Tensor, alpha: float, rate: float) -> Tensor:
    """One subgradient step of GradNorm (Chen et al. 2018) on Σ |G_t - mean(G) r_t^alpha|, G_t = w_t |g_t|. [T].

    rates: loss over initial loss; r_t is that over its mean. The step is taken on log w and relative to mean(G), so weights
    stay positive and the scale of the gradients does not matter; then they are rescaled to the sum they had.
    """
    count = active.sum().clamp(min=1)
    scaled = torch.where(active, weights * norms, 0.0)  # G
    mean = (scaled.sum() / count).clamp(min=torch.finfo(scaled.dtype).tiny)
    rates = torch.where(active, rates, 0.0)
    relative = rates / (rates.sum() / count).clamp(min=torch.finfo(scaled.dtype).tiny)
    slope = (scaled / mean - relative**alpha).sign() * scaled / mean
    moved = torch.where(active, weights * torch.exp(-rate * slope), 0.0)
    before = torch.where(active, weights, 0.0).sum()
    return torch.where(active, moved * (before / moved.sum().clamp(min=torch.finfo(scaled.dtype).tiny)), weights)
