"""Older ways to weigh tasks, to compare with: MGDA, PCGrad, GradNorm, and uncertainty weighting.

The first three are published for gradients of all shared parameters, which would take a backward pass per task through
the tables and so as many updates of fused sparse optimisers. Here they see the gradients at the shared representation.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from raysys.errors import UserError, nearest
from raysys.objectives import rules
from raysys.objectives.balance import ROUNDING, Balanced
from raysys.objectives.supervised import Supervised, TaskLosses, check_key
from raysys.schema import FeatureSchema

NORMALIZATIONS = ("none", "l2", "loss", "loss+")


class MGDA(Balanced):
    """Direction Σ λ_i g_i of least norm over the simplex, at the shared representation: MGDA-UB (Sener & Koltun 2018).

    normalize: what the g_i are divided by where λ is chosen (the direction is of the g_i themselves): `l2` |g_i|, `loss`
    the task's loss, `loss+` both. `none` drifts to the task with the smallest gradients.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        normalize: str = "none",
        task_weights: Mapping[str, float] | None = None,
        embedding_l2: float = 0.0,
    ) -> None:
        super().__init__(schema, task_weights=task_weights, embedding_l2=embedding_l2)
        if normalize not in NORMALIZATIONS:
            raise UserError(f"objective.normalize is {normalize!r}", nearest(normalize, NORMALIZATIONS))
        self.normalize = normalize

    def weigh(self, gram: Tensor, losses: Tensor) -> Tensor:
        """λ."""
        norms = gram.diagonal().clamp(min=0).sqrt()
        scale = torch.ones_like(norms)
        if self.normalize in ("l2", "loss+"):
            scale = scale * norms
        if self.normalize in ("loss", "loss+"):
            scale = scale * losses
        scale = torch.where(scale > 0, scale, 1.0)
        return rules.min_norm(gram / torch.outer(scale, scale), norms > 0, ROUNDING)


class PCGrad(Balanced):
    """Each task's gradient without what conflicts with another's, added up (Yu et al. 2020), at the shared representation.

    seed: of the random order in which a gradient is compared with the others; the same on every rank.
    """

    step: Tensor

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        seed: int = 0,
        task_weights: Mapping[str, float] | None = None,
        embedding_l2: float = 0.0,
    ) -> None:
        super().__init__(schema, task_weights=task_weights, embedding_l2=embedding_l2)
        self.seed = seed
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def weigh(self, gram: Tensor, losses: Tensor) -> Tensor:
        """What each g_i comes to in the sum."""
        self.step += 1
        return rules.pcgrad(gram, rules.random_orders(self.step, len(gram), self.seed))


class GradNorm(Balanced):
    """Direction Σ w_i g_i with learned w > 0, Σ w = T, that lead |w_i g_i| to mean · r_i^alpha (Chen et al. 2018).

    r_i is the task's loss over its initial one, relative to the mean of that over tasks: what learns slowly weighs more.
    alpha: 0 for equal norms. rate: of the steps on log w (the paper learns w itself, where the step depends on the scale of
    the gradients). warmup_steps: steps with w = 1, after which the initial losses are taken. Unlike in the paper, w does
    not weigh the heads.
    """

    step: Tensor
    learned: Tensor
    initial_losses: Tensor

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        alpha: float = 1.5,
        rate: float = 0.025,
        warmup_steps: int = 100,
        task_weights: Mapping[str, float] | None = None,
        embedding_l2: float = 0.0,
    ) -> None:
        super().__init__(schema, task_weights=task_weights, embedding_l2=embedding_l2)
        check_key("alpha", alpha, alpha >= 0, "a number of at least 0")
        check_key("rate", rate, rate > 0, "a number above 0")
        check_key("warmup_steps", warmup_steps, warmup_steps >= 0, "a number of at least 0")
        self.alpha, self.rate, self.warmup_steps = alpha, rate, warmup_steps
        zeros = torch.zeros(len(schema.tasks), dtype=torch.float64)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("learned", zeros + 1)
        self.register_buffer("initial_losses", zeros)  # 0 until known

    def weigh(self, gram: Tensor, losses: Tensor) -> Tensor:
        """w before this batch's step on it."""
        self.step += 1
        norms = gram.diagonal().clamp(min=0).sqrt()
        active = (norms > 0) & (self.step > self.warmup_steps)
        self.initial_losses.copy_(torch.where(active & (self.initial_losses == 0), losses, self.initial_losses))
        weights = self.learned.clone()
        rates = torch.where(active, losses / torch.where(active, self.initial_losses, 1.0), 1.0)
        self.learned.copy_(rules.gradnorm_step(weights, norms, rates, active, self.alpha, self.rate))
        return weights


class Uncertainty(Supervised):
    """Learned weights exp(-s_t), s_t = log variance (Kendall et al. 2018): Σ exp(-s_t) l_t + s_t / 2, a regression task's l_t halved.

    At the optimum of s_t the weight on l_t is 1 / (2 l_t). The s_t start at 0 and train with the dense optimiser; that of a
    task without labels in a batch stays. The weights act on the whole model, heads included, and need no gradient of a
    task. task_weights: factors of each task's two terms. The reported loss is this one (it may be negative), the parts
    are the plain losses.
    """

    halves: Tensor

    def __init__(
        self, schema: FeatureSchema, *, task_weights: Mapping[str, float] | None = None, embedding_l2: float = 0.0
    ) -> None:
        super().__init__(schema, task_weights=task_weights, embedding_l2=embedding_l2)
        halves = [0.5 if label.kind == "regression" else 1.0 for label in schema.labels]
        self.register_buffer("halves", torch.tensor(halves), persistent=False)
        self.log_variance = nn.Parameter(torch.zeros(len(halves)))

    def weighted(self, losses: TaskLosses) -> Tensor:
        """The loss above; s_t / 2 is the same on every rank, so its average over ranks is right, too."""
        terms = self.halves * torch.exp(-self.log_variance) * losses.per_task + 0.5 * self.log_variance
        factors = torch.tensor(self.task_weights, device=terms.device)
        return (factors * torch.where(losses.labelled > 0, terms, 0.0)).sum()
