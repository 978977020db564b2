"""Retrieval by softmax over the items of the batch, uniform negatives and what a user turned down, corrected by logQ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from raysys.data.catalogue import NO_ROW, CatalogueItems, KeyLookup
from raysys.errors import UserError, nearest
from raysys.models.outputs import Embedded, Output
from raysys.nn.collectives import gather_with_grad, global_sum, rank, world_size
from raysys.nn.frequency import StreamingFrequency
from raysys.objectives.supervised import check_key, or_one
from raysys.schema import FeatureSchema

if TYPE_CHECKING:
    from raysys.data.batch import Batch
    from raysys.models.retrieval.base import RetrievalModel

LogQ = Literal["counts", "streaming", "none"]


class SampledSoftmax(nn.Module):
    """-Σ_n w_n log softmax_m(s(x_n, i_m) - log c(i_m))[n] / Σ w_n over the positive rows n of the global batch.

    Candidates m are the items of all positive rows, `negatives` items drawn uniformly from the catalogue (over all workers)
    and, with `hard_negatives`, the items that the row's own group was shown without the label. c(i) is how often an item is
    expected among the candidates that were drawn: positive rows · (its share of training positives) + negatives / N (Yi et al.,
    RecSys 2019, section 4; the mixture after Yang et al., WWW 2020). What was shown to the user is not drawn: c is 1 there.
    Another row with the same item is no negative. The model's own scores, without the correction, are what is served.

    log_q: where the share comes from: the counts of the training split, a streaming estimate of the probability to be in a batch
        (for logs without end), or none.
    refined: the positive is not drawn either, so it leaves the corrected sum: -(1 - P_n) [s_n - log Σ_{m≠n} exp(s_m - log c_m)]
        with P_n the probability of the positive, constant (Khrylchenko et al., RecSys 2025, arXiv 2507.09331).
    """

    def __init__(
        self,
        schema: FeatureSchema,
        *,
        items: CatalogueItems,
        negatives: int = 0,
        hard_negatives: bool = False,
        log_q: LogQ = "counts",
        refined: bool = False,
    ) -> None:
        super().__init__()
        check_key("negatives", negatives, negatives >= 0, "a number of at least 0")
        if log_q not in get_args(LogQ):
            raise UserError(f"objective.log_q is {log_q!r}", nearest(str(log_q), get_args(LogQ)))
        if hard_negatives and schema.group_id is None:
            raise UserError(
                "objective.hard_negatives is true, and the schema has no group_id", "name the users' column"
            )
        self.items, self.task = items, schema.tasks.index(items.task)
        self.negatives, self.hard_negatives, self.refined = negatives, hard_negatives, refined
        self.lookup = KeyLookup(items.keys)
        self.share: Tensor
        total = max(int(items.counts.sum()), 1)
        self.register_buffer("share", torch.from_numpy(items.counts / total).float(), persistent=False)
        self.log_q = log_q
        self.frequency = StreamingFrequency() if log_q == "streaming" else None

    def augment(self, batch: Batch, seed: int) -> Batch:
        """The batch with this worker's part of the uniform negatives behind it."""
        count = self._own_negatives()
        if count == 0:
            return batch
        generator = torch.Generator().manual_seed(seed)
        return self.items.append(batch, torch.randint(len(self.items), (count,), generator=generator))

    def forward(
        self, model: RetrievalModel, batch: Batch, embedded: Embedded
    ) -> tuple[Tensor, Output, dict[str, Tensor]]:
        """Loss (this rank's share), scores of the rows' own items as logits, and the share of rows whose item came first."""
        rows = len(batch) - self._own_negatives()  # B
        users, items = model.encode_users(embedded.rows(0, rows)), model.encode_items(embedded)
        keys = batch.extra[self.items.key]
        assert isinstance(keys, Tensor)
        row = self.lookup(keys)  # [B + M]
        positive = batch.weight[:, self.task] * (batch.labels[:, self.task] > 0)  # [B + M]
        weight = positive[:rows]
        candidates = _Candidates(
            vectors=gather_with_grad(items),
            row=gather_with_grad(row),
            drawn=gather_with_grad((positive > 0) | (torch.arange(len(row), device=row.device) >= rows)),
            group=gather_with_grad(batch.group_id),
            shown=gather_with_grad((batch.weight[:, self.task] > 0) & (positive == 0)),
        )
        own = rank() * len(row) + torch.arange(rows, device=row.device)  # [B], each row's own column
        scores = model.score(users, candidates.vectors)  # [B, C]
        count = global_sum((weight > 0).sum())
        logits = scores - torch.where(candidates.drawn, self._log_expected(candidates.row, keys, count), 0.0)
        logits = logits.masked_fill(~self._allowed(candidates, row[:rows], own, batch.group_id[:rows]), -torch.inf)
        losses = self._losses(logits, scores, own)
        total = or_one(global_sum(weight.sum()))
        first = (logits.detach().argmax(1) == own).float()
        loss, hits = (world_size() * (weight * values).sum() / total for values in (losses, first))
        return loss, Output(scores.gather(1, own[:, None]), users, users[:, None]), {"first": hits.detach()}

    def _own_negatives(self) -> int:
        return self.negatives // world_size()

    def _log_expected(self, row: Tensor, keys: Tensor, positives: Tensor) -> Tensor:
        """[C] log of how often each candidate's item is expected among those that are drawn."""
        uniform = self._own_negatives() * world_size() / len(self.items)
        if self.log_q == "none":
            return torch.zeros((), device=row.device)
        if self.frequency is not None:
            all_keys = gather_with_grad(keys)
            if self.training:
                self.frequency.update(torch.where(row >= 0, all_keys, -1))
            expected = self.frequency(all_keys).float()
        else:
            drawn = positives - 1 if self.refined else positives
            expected = drawn * self.share[row.clamp(min=0)]
        return (expected + uniform).clamp(min=torch.finfo(torch.float32).tiny).log()

    def _allowed(self, candidates: _Candidates, row: Tensor, own: Tensor, group: Tensor) -> Tensor:
        """[B, C] the candidates of each row: not what is the same item in another place."""
        allowed = candidates.drawn.expand(len(row), -1)
        if self.hard_negatives:
            allowed = allowed | (candidates.shown & (candidates.group == group[:, None]))
        allowed = allowed & (candidates.row != NO_ROW) & (candidates.row != row[:, None])
        return allowed.scatter(1, own[:, None], True)

    def _losses(self, logits: Tensor, scores: Tensor, own: Tensor) -> Tensor:
        """[B]."""
        if not self.refined:
            return -logits.log_softmax(1).gather(1, own[:, None])[:, 0]
        positive = scores.gather(1, own[:, None])[:, 0]
        others = logits.scatter(1, own[:, None], -torch.inf).logsumexp(1)
        probability = torch.sigmoid(positive - others).detach()
        return torch.where(others == -torch.inf, 0.0, -(1 - probability) * (positive - others))


class _Candidates:
    """All ranks' candidates [C]: vectors, catalogue rows, whether they were drawn or shown to their group without the label."""

    def __init__(self, vectors: Tensor, row: Tensor, drawn: Tensor, group: Tensor, shown: Tensor) -> None:
        self.vectors, self.row, self.drawn, self.group, self.shown = vectors, row, drawn, group, shown
