"""Gradient balancing at the shared representation: one gradient for each task there, one direction for the trunk below."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from raysys.models.heads import TaskTowers
from raysys.models.ranking.base import RankingModel
from raysys.nn.collectives import global_sum, world_size
from raysys.objectives.supervised import Ranker, Supervised
from raysys.schema import FeatureSchema

if TYPE_CHECKING:
    from raysys.data.batch import Batch
    from raysys.models.outputs import Embedded, Output

ROUNDING = 1e-6  # of inner products of float32 gradients, relative to their norms


class Balanced(Supervised, ABC):
    """`Supervised`, except that trunk and tables go back along Σ w_i g_i, where g_i = d L_i / d shared [B, H].

    A subclass gives the weights w from the Gram matrix of the g_i (`weigh`). Heads (towers; experts and gates, too) get the
    plain gradient of their own losses, and the loss and parts that are reported are the plain ones. The trunk and the
    tables are gone through once, as fused sparse optimisers demand: they apply an update with every backward pass.

    Where the head is `TaskTowers` each tower reads an input of its own, and all g_i come out of the one backward pass.
    Of any other head (shared experts) the g_i are taken one after the other, through the head only: T passes more there.

    The g_i are of the joint batch: their inner products are summed over ranks, in one all-reduce a step of T² + T numbers.
    A step whose gradients are not finite changes no average that a rule keeps; `direction_norm` is not finite either then,
    and the run stops there. What a rule remembers is in buffers: checkpointed, and the same on every rank.

    After a backward pass `weights` [T] and `direction_norm` (| Σ w_i g_i |) tell of that step; they are among the parts.
    """

    weights: Tensor
    direction_norm: Tensor

    def __init__(
        self, schema: FeatureSchema, *, task_weights: Mapping[str, float] | None = None, embedding_l2: float = 0.0
    ) -> None:
        super().__init__(schema, task_weights=task_weights, embedding_l2=embedding_l2)
        self.register_buffer("weights", torch.ones(len(schema.labels), dtype=torch.float64))
        self.register_buffer("direction_norm", torch.zeros((), dtype=torch.float64))

    @abstractmethod
    def weigh(self, gram: Tensor, losses: Tensor) -> Tensor:
        """Weights [T] of the g_i from M_ij = ⟨g_i, g_j⟩ [T, T] and the tasks' losses [T], of the joint batch, in float64.

        A task without labels in the batch has a row and a column of 0. May change buffers.
        """

    def forward(self, model: Ranker, batch: Batch, embedded: Embedded) -> tuple[Tensor, Output, dict[str, Tensor]]:
        """As in `Supervised`; the parts also hold each task's weight and the norm of the direction."""
        if not torch.is_grad_enabled():
            return super().forward(model, batch, embedded)
        shared = model.interact(embedded)
        join = _Join(self)
        fan_out = _takes_an_input_per_task(model)
        inputs = (
            cast(Tensor, _FanOut.apply(shared, join, len(self.labels))) if fan_out else shared.detach().requires_grad_()
        )
        output = model.predict(inputs)
        output.shared = shared
        losses = self.task_losses(output.logits, batch)
        join.losses = losses.per_task.detach()
        loss = self.weighted(losses)
        if not fan_out:
            direction = join(self._gradients(losses.per_task, inputs))
            loss = cast(Tensor, _Redirect.apply(loss, shared, direction))
        loss, parts = self.add_up(loss, losses, batch, embedded)
        # Views, not copies: who reads them after the backward pass sees what it has found.
        weights = {f"weight_{label.name}": self.weights[i] for i, label in enumerate(self.labels)}
        return loss, output, parts | weights | {"direction_norm": self.direction_norm}

    def _gradients(self, per_task: Tensor, inputs: Tensor) -> Tensor:
        """The g_i through the head alone, [T, B, H]. No parameter is reached, so no hook of one is called."""
        with torch.autocast(inputs.device.type, enabled=False):  # backward passes are not meant to run under it
            found = [
                weight * torch.autograd.grad(loss, inputs, retain_graph=True)[0]
                for weight, loss in zip(self.task_weights, per_task.unbind(), strict=True)
            ]
        return torch.stack(found)

    @torch.no_grad()
    def direction(self, gradients: Tensor, losses: Tensor) -> Tensor:
        """Σ w_i g_i of this rank's rows, [B, H], from its g_i [T, B, H] and shares of the losses [T] (collective)."""
        num_tasks, ranks = len(losses), world_size()
        with torch.autocast(gradients.device.type, enabled=False):
            own = gradients.float()
            rows = own.transpose(0, 1)  # [B, T, H]
            # Row by row, then over the rows: one product over all B H columns rounds as one sum does, 1e-4 for some million.
            products = torch.bmm(rows, rows.transpose(1, 2)).sum(0, dtype=torch.float64)  # [T, T]
            sums = global_sum(torch.cat([products.flatten(), losses.double()]))
            # Each rank's loss counts `ranks` times, because gradients of parameters are averaged over ranks.
            gram, losses = sums[:-num_tasks].view(num_tasks, num_tasks) / ranks**2, sums[-num_tasks:] / ranks
            finite = gram.isfinite().all()
            weights = self.weigh(torch.where(finite, gram, 0.0), losses)
            self.weights.copy_(torch.where(finite, weights, 1.0))
            self.direction_norm.copy_((self.weights @ gram @ self.weights).clamp(min=0).sqrt())
            return (self.weights.float() @ own.flatten(1)).view_as(gradients[0]).to(gradients.dtype)


class _Join:
    """What one step's backward pass does where the tasks meet. It holds no graph, which would hold it in turn."""

    losses: Tensor  # [T]

    def __init__(self, objective: Balanced) -> None:
        self._objective = objective

    def __call__(self, gradients: Tensor) -> Tensor:
        """[T, B, H] → [B, H]."""
        return self._objective.direction(gradients, self.losses)


class _FanOut(torch.autograd.Function):
    """The same input [B, H] for each task, [T, B, H]; backward, their gradients are joined into one."""

    @staticmethod
    def forward(ctx: Any, shared: Tensor, join: _Join, num_tasks: int) -> Tensor:
        ctx.join = join
        return shared.expand(num_tasks, -1, -1)

    @staticmethod
    def backward(ctx: Any, gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.join(gradients), None, None


class _Redirect(torch.autograd.Function):
    """The loss as it is; backward, `shared` gets `direction` besides."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, shared: Tensor, direction: Tensor) -> Tensor:
        ctx.save_for_backward(direction)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (direction,) = ctx.saved_tensors
        return gradient, gradient * direction, None


def _takes_an_input_per_task(model: Ranker) -> bool:
    """Whether `predict` is separate towers, which also take [T, B, H]."""
    if not isinstance(model, RankingModel) or type(model).predict is not RankingModel.predict:
        return False
    return isinstance(model.towers, TaskTowers) and model.towers.parts == 1
