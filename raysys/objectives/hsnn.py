"""Joint learning of a retrieval network and of the hierarchy that it is served with (HSNN)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from raysys.data.catalogue import CatalogueItems
from raysys.errors import UserError, nearest
from raysys.models.outputs import Embedded, Output
from raysys.models.retrieval.hsnn import HSNN
from raysys.nn.collectives import global_sum, world_size
from raysys.nn.residual_nodes import Assignment, ResidualNodes, perplexity, usage_penalty
from raysys.objectives.sampled_softmax import Candidates, LogQ, SampledSoftmax
from raysys.objectives.supervised import check_key, or_one
from raysys.schema import FeatureSchema

if TYPE_CHECKING:
    from raysys.data.batch import Batch
    from raysys.models.retrieval.base import RetrievalModel

Loss = Literal["softmax", "bce"]
Update = Literal["joint", "em"]


class HSNNLoss(SampledSoftmax):
    """L⁰ + λ(step) Σ_l L^l + Σ_l C_l β F_l (Rangadurai et al. 2025, arXiv 2408.06653; Fu et al. 2026, arXiv 2604.12965).

    L⁰ is the loss of the network on items, L^l on the pseudo-items that stand for them at level l, with the network of that
    level: a node is trained to be a good stand-in for what is below it, for this network. Candidates and logQ are those of
    `SampledSoftmax`: impressions alone would not teach nodes to reject most of a catalogue (ours). F_l balances the use of
    nodes (`usage_penalty`), over the drawn catalogue items where there are any.

    loss: softmax over the candidates, or bce: of a row's own item and, with the weight of one, of all others; logits are
        corrected alike. warmup: share of the steps in which λ rises from 0 to 1. temperature: where the assignments' T
        starts and ends; it falls exponentially over the share `cooling` of the steps, so that at the end a vector is
        assigned as it is when served. balance: β. reseed: a node whose share of nearest items stays below
        reseed / C_l is moved to a random residual of the batch, 0: never.
    update: joint, or em: nodes are no parameters of the loss; every `em_every` steps they are k-means centroids of recent
        item vectors, level by level, from where they were, and items have the pseudo-items of their nearest nodes.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        items: CatalogueItems,
        negatives: int = 1024,
        log_q: LogQ = "counts",
        loss: Loss = "softmax",
        warmup: float = 0.1,
        temperature: tuple[float, float] = (1.0, 0.05),
        cooling: float = 0.7,
        balance: float = 0.01,
        reseed: float = 0.1,
        update: Update = "joint",
        em_every: int = 200,
        em_memory: int = 65536,
    ) -> None:
        super().__init__(schema, items=items, negatives=negatives, log_q=log_q)
        for key, value, known in (("loss", loss, get_args(Loss)), ("update", update, get_args(Update))):
            if value not in known:
                raise UserError(f"objective.{key} is {value!r}", nearest(str(value), known))
        check_key("warmup", warmup, 0 <= warmup <= 1, "a share of the steps, 0 to 1,")
        check_key("cooling", cooling, 0 < cooling <= 1, "a share of the steps, above 0 and up to 1,")
        check_key(
            "temperature", list(temperature), temperature[0] >= temperature[1] > 0, "[start, end], falling, above 0,"
        )
        check_key("balance", balance, balance >= 0, "a number of at least 0")
        check_key("reseed", reseed, 0 <= reseed < 1, "a number of at least 0 and below 1")
        self.kind, self.update = loss, update
        self.warmup, self.range, self.cooling, self.balance, self.reseed = warmup, temperature, cooling, balance, reseed
        self.em_every, self.em_memory = em_every, em_memory
        self.temperature, self.index_weight, self.step = temperature[0], 0.0, 0
        self._moves: list[tuple[Tensor, Tensor, Tensor]] = []
        self._memory: list[Tensor] = []

    def after_step(self, step: int, total: int) -> None:
        """Temperature and weight of the step that comes, and the moves of nodes that the step before asked for."""
        self.step = step
        progress = step / max(total, 1)
        start, end = self.range
        self.temperature = start * (end / start) ** min(progress / self.cooling, 1.0)
        self.index_weight = 1.0 if self.warmup == 0 else min(progress / self.warmup, 1.0)
        with torch.no_grad():
            for nodes, which, where in self._moves:
                nodes[which] = where
        self._moves = []

    def forward(
        self, model: RetrievalModel, batch: Batch, embedded: Embedded
    ) -> tuple[Tensor, Output, dict[str, Tensor]]:
        """Loss (this rank's share), scores of the rows' own items, and the losses and usage of the levels, numbered from 1."""
        if not isinstance(model, HSNN):
            raise UserError(f"HSNNLoss trains a hierarchy, and {type(model).__name__} has none", "model=hsnn")
        drawn = self.candidates(model, batch, embedded)
        generator = torch.Generator().manual_seed(self.step)
        if not model.quantizer.placed:
            model.quantizer.place(drawn.items.detach(), generator)
        scores = model.score(drawn.users, drawn.items)  # [B, C]
        loss, first = self.loss(scores, drawn)
        parts = {"items": loss.detach(), "first": first}
        for level, assignment in enumerate(self._assign(model.quantizer, drawn.items), 1):
            level_scores = model.score_level(drawn.users, assignment.partial, level)
            level_loss, parts[f"first_{level}"] = self.loss(level_scores, drawn)
            counted = assignment.weights[drawn.uniform] if self.own_negatives else assignment.weights
            penalty = usage_penalty(counted)
            loss = loss + self.index_weight * level_loss + self.balance * counted.shape[1] * penalty
            parts |= {f"level_{level}": level_loss.detach(), f"in_use_{level}": perplexity(counted).detach()}
        if self.training:
            self._plan_moves(model.quantizer, drawn.items.detach(), generator)
        return loss, drawn.output(scores), parts

    def loss(self, scores: Tensor, drawn: Candidates) -> tuple[Tensor, Tensor]:
        """As `SampledSoftmax.loss`, of the kind that was asked for."""
        if self.kind == "softmax":
            return super().loss(scores, drawn)
        logits = scores - drawn.log_expected
        others = drawn.allowed.scatter(1, drawn.own[:, None], False).to(logits.dtype)
        own = logits.gather(1, drawn.own[:, None])[:, 0]
        negative = (F.softplus(logits) * others).sum(1) / others.sum(1).clamp(min=1)
        total = or_one(global_sum(drawn.weight.sum()))
        first = (own >= logits.detach().masked_fill(~drawn.allowed, -torch.inf).amax(1)).float()
        losses = F.softplus(-own) + negative
        loss, hits = (world_size() * (drawn.weight * values).sum() / total for values in (losses, first))
        return loss, hits.detach()

    def _assign(self, quantizer: ResidualNodes, items: Tensor) -> list[Assignment]:
        if self.update == "joint":
            return quantizer(items, self.temperature)
        self._remember(quantizer, items.detach())
        with torch.no_grad():
            return quantizer(items, None)

    def _plan_moves(self, quantizer: ResidualNodes, items: Tensor, generator: torch.Generator) -> None:
        """Ask for idle nodes to be moved after the step: until then the backward pass needs them where they are."""
        with torch.no_grad():
            levels = quantizer(items, None)
            quantizer.track(levels)
        for level, assignment in enumerate(levels if self.reseed > 0 and self.update == "joint" else ()):
            idle = quantizer.idle(level, self.reseed)
            if len(idle):
                chosen = torch.randint(len(items), (len(idle),), generator=generator).to(items.device)
                where = assignment.residual[chosen]
                noise = torch.randn(where.shape, generator=generator).to(where) * 0.01 * where.std()
                self._moves.append((quantizer.nodes[level], idle, where + noise))
                quantizer.usage(level)[idle] = 1 / len(quantizer.usage(level))  # a new place, a new start

    def _remember(self, quantizer: ResidualNodes, items: Tensor) -> None:
        """Keep the latest vectors, and every `em_every` steps fit the nodes to them (the E-step)."""
        if not self.training:
            return
        self._memory.append(items)
        while sum(map(len, self._memory)) > self.em_memory + len(items):
            self._memory.pop(0)
        if self.step % self.em_every == 0:
            quantizer.fit(torch.cat(self._memory))
