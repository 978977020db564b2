"""MultiBalance: the tasks' gradients at the shared representation, brought to one scale by their usual magnitude."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raysys.errors import UserError, nearest
from raysys.objectives import rules
from raysys.objectives.balance import ROUNDING, Balanced
from raysys.objectives.supervised import Ranker, Supervised, check_key
from raysys.schema import FeatureSchema

if TYPE_CHECKING:
    from raysys.data.batch import Batch
    from raysys.models.outputs import Embedded, Output

RULES = ("minnorm", "moco", "normeq", "metabalance", "sum")


class MultiBalance(Balanced):
    """Direction S Σ λ_i g_i / m_i with λ on the simplex, m_i a moving average of |g_i|, S = Σ m_i over active tasks.

    He et al. 2024 (arXiv 2411.11871). Known of the paper for certain: gradients at the shared representation, a moving
    average of their magnitudes, no task weights set by hand. Its formula for λ was not seen: `minnorm` and `moco` follow
    what it builds on, `normeq` is what two secondary texts say of it.

    rule: `minnorm`, the shortest vector that a convex combination of the g_i / m_i gives (MGDA-UB): no task's loss rises
    along it in the space of the representation, which is no promise for the parameters below. `moco`, one step towards
    that a batch, so that the noise of a batch does not set λ. `normeq`, λ the same for all. `metabalance` (He et al. 2022),
    no simplex: relax · m_target / m_i + 1 - relax for each task. `sum`, no balancing, as `Supervised`.
    beta, eps: of m, with bias correction. warmup_steps: steps with the plain sum, while m fills.
    floor: least λ of an active task, renormalised afterwards. priorities: factors of λ by task, then renormalised; unlike
    `task_weights`, which the division by m takes out of the direction (the heads and the reported loss keep them).
    gamma, rho, gram_beta: of moco; step gamma/√t, ridge, and the moving average of the Gram matrix. target, relax: of
    metabalance; the first task by default.

    A task without labels in a batch is left out: its m stays, and its λ of `moco`. `magnitudes()` tells m, `shares` λ before floor and
    priorities.
    """

    priorities: Tensor
    magnitude: Tensor
    seen: Tensor
    shares: Tensor
    gram: Tensor
    gram_seen: Tensor
    step: Tensor

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        rule: str = "minnorm",
        beta: float = 0.9,
        eps: float = 1e-8,
        warmup_steps: int = 100,
        floor: float = 0.0,
        priorities: Mapping[str, float] | None = None,
        gamma: float = 0.1,
        rho: float = 0.0,
        gram_beta: float = 0.9,
        target: str | None = None,
        relax: float = 0.7,
        task_weights: Mapping[str, float] | None = None,
        embedding_l2: float = 0.0,
    ) -> None:
        super().__init__(schema, task_weights=task_weights, embedding_l2=embedding_l2)
        tasks, num_tasks = schema.tasks, len(schema.tasks)
        if rule not in RULES:
            raise UserError(f"objective.rule is {rule!r}", nearest(rule, RULES))
        if target is not None and target not in tasks:
            raise UserError(f"objective.target: no task {target!r} in {schema.source}", nearest(target, tasks))
        check_key("beta", beta, 0 <= beta < 1, "a number from 0 to below 1")
        check_key("gram_beta", gram_beta, 0 <= gram_beta < 1, "a number from 0 to below 1")
        check_key("eps", eps, eps > 0, "a number above 0")
        check_key("warmup_steps", warmup_steps, warmup_steps >= 0, "a number of at least 0")
        check_key("floor", floor, 0 <= floor * num_tasks <= 1, f"a number from 0 to 1 / {num_tasks} tasks")
        check_key("gamma", gamma, gamma > 0, "a number above 0")
        check_key("rho", rho, rho >= 0, "a number of at least 0")
        check_key("relax", relax, 0 <= relax <= 1, "a number from 0 to 1")
        self.rule, self.beta, self.eps, self.warmup_steps, self.floor = rule, beta, eps, warmup_steps, floor
        self.gamma, self.rho, self.gram_beta, self.relax = gamma, rho, gram_beta, relax
        self.target = tasks.index(target) if target is not None else 0
        zeros = torch.zeros(num_tasks, dtype=torch.float64)
        self.register_buffer("priorities", _priorities(schema, priorities or {}), persistent=False)
        self.register_buffer("magnitude", zeros.clone())  # before bias correction
        self.register_buffer("seen", zeros.clone())  # steps in which the task was active
        self.register_buffer("shares", zeros + 1 / num_tasks)  # λ
        self.register_buffer("gram", torch.outer(zeros, zeros))  # of moco, the moving average
        self.register_buffer("gram_seen", torch.zeros(num_tasks, num_tasks, dtype=torch.bool))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, model: Ranker, batch: Batch, embedded: Embedded) -> tuple[Tensor, Output, dict[str, Tensor]]:
        """As in `Balanced`; without gradients of the tasks where the rule is `sum`."""
        return (Supervised if self.rule == "sum" else Balanced).forward(self, model, batch, embedded)

    def magnitudes(self) -> Tensor:
        """The usual |g_i| [T]; 0 for a task that had no labels so far."""
        return self.magnitude / (1 - self.beta**self.seen).clamp(min=torch.finfo(torch.float64).tiny)

    def weigh(self, gram: Tensor, losses: Tensor) -> Tensor:
        """Weights of the g_i; the plain sum while m fills."""
        norms = gram.diagonal().clamp(min=0).sqrt()
        active = norms > 0
        self.step += 1
        self.seen += active
        self.magnitude.copy_(torch.where(active, self.beta * self.magnitude + (1 - self.beta) * norms, self.magnitude))
        usual = self.magnitudes()
        scale = usual + self.eps
        if self.rule == "metabalance":
            ratio = torch.where(usual[self.target] > 0, usual[self.target] / scale, 1.0)
            weights = self.relax * ratio + 1 - self.relax
        else:
            self._choose_shares(gram / torch.outer(scale, scale), active)
            weights = torch.where(active, usual, 0.0).sum() * self._adjusted_shares(active) / scale
        return torch.where(self.step > self.warmup_steps, weights, 1.0)

    def _choose_shares(self, gram: Tensor, active: Tensor) -> None:
        """λ by the rule, from the Gram matrix of the g_i / m_i."""
        if self.rule == "minnorm":
            self.shares.copy_(rules.min_norm(gram, active, ROUNDING))
        elif self.rule == "normeq":
            self.shares.copy_(rules.uniform(active))
        else:
            both = active[:, None] & active
            kept = torch.where(self.gram_seen, self.gram_beta * self.gram + (1 - self.gram_beta) * gram, gram)
            self.gram.copy_(torch.where(both, kept, self.gram))
            self.gram_seen |= both
            known = torch.where(both, self.gram, 0.0)
            self.shares.copy_(rules.moco_step(self.shares, known, active, self.gamma / self.step.sqrt(), self.rho))

    def _adjusted_shares(self, active: Tensor) -> Tensor:
        """λ over the active tasks with floor and priorities, sum 1."""
        shares = torch.where(active, self.shares.clamp(min=self.floor) * self.priorities, 0.0)
        total = shares.sum()
        return torch.where(total > 0, shares / total, rules.uniform(active))


def _priorities(schema: FeatureSchema, priorities: Mapping[str, Any]) -> Tensor:
    for task, priority in priorities.items():
        if task not in schema.tasks:
            raise UserError(f"objective.priorities: no task {task!r} in {schema.source}", nearest(task, schema.tasks))
        check_key(f"priorities.{task}", priority, float(priority) > 0, "a number above 0")
    return torch.tensor([float(priorities.get(task, 1.0)) for task in schema.tasks], dtype=torch.float64)
