"""Retrieval by softmax over the items of the batch, uniform negatives and what a user turned down, corrected by logQ."""

from __future__ import annotations

from dataclasses import dataclass
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
    Another row with the same item is no negative; of an item that fills much of a batch c then takes too much off, and it is
    scored too high (by 0.7 at 40% of the rows). The model's own scores, without the correction, are what is served.

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
        if self.own_negatives == 0:
            return batch
        generator = torch.Generator().manual_seed(seed)
        return self.items.append(batch, torch.randint(len(self.items), (self.own_negatives,), generator=generator))

    def forward(
        self, model: RetrievalModel, batch: Batch, embedded: Embedded
    ) -> tuple[Tensor, Output, dict[str, Tensor]]:
        """Loss (this rank's share), scores of the rows' own items as logits, and the share of rows whose item came first."""
        drawn = self.candidates(model, batch, embedded)
        scores = model.score(drawn.users, drawn.items)  # [B, C]
        loss, first = self.loss(scores, drawn)
        return loss, drawn.output(scores), {"first": first}

    def candidates(self, model: RetrievalModel, batch: Batch, embedded: Embedded) -> Candidates:
        """The rows' users and all ranks' candidates, encoded (collective)."""
        rows = len(batch) - self.own_negatives  # B
        users, items = model.encode_users(embedded.rows(0, rows)), model.encode_items(embedded)
        keys = batch.extra[self.items.key]
        assert isinstance(keys, Tensor)
        labelled = batch.weight[:, self.task]  # [B + M]
        positive = labelled * (batch.labels[:, self.task] > 0)
        appended = torch.arange(len(batch), device=keys.device) >= rows
        all_keys = gather_with_grad(keys)  # [C], C = W (B + M)
        row, chosen, uniform = self.lookup(all_keys), gather_with_grad(positive > 0), gather_with_grad(appended)
        drawn = chosen | uniform
        own = rank() * len(batch) + torch.arange(rows, device=keys.device)
        allowed = drawn.expand(rows, -1)
        if self.hard_negatives:
            shown = gather_with_grad((labelled > 0) & (positive == 0))
            allowed = allowed | (shown & (gather_with_grad(batch.group_id) == batch.group_id[:rows, None]))
        allowed = allowed & (row != NO_ROW) & (row != row[own][:, None])
        log_expected = torch.where(drawn, self._log_expected(row, all_keys, chosen), 0.0)
        return Candidates(
            users=users,
            items=gather_with_grad(items),
            own=own,
            weight=positive[:rows],
            allowed=allowed.scatter(1, own[:, None], True),
            log_expected=log_expected,
            uniform=uniform,
        )

    def loss(self, scores: Tensor, drawn: Candidates) -> tuple[Tensor, Tensor]:
        """The loss of scores [B, C] (this rank's share), and the share of rows whose own item has the highest one."""
        logits = (scores - drawn.log_expected).masked_fill(~drawn.allowed, -torch.inf)
        losses = self._losses(logits, scores, drawn.own)
        total = or_one(global_sum(drawn.weight.sum()))
        first = (logits.detach().argmax(1) == drawn.own).float()
        loss, hits = (world_size() * (drawn.weight * values).sum() / total for values in (losses, first))
        return loss, hits.detach()

    @property
    def own_negatives(self) -> int:
        """Rows that `augment` puts behind this worker's batch."""
        return self.negatives // world_size()

    def _log_expected(self, row: Tensor, keys: Tensor, chosen: Tensor) -> Tensor:
        """[C] log of how often each candidate's item is expected among those that are drawn; chosen: [C] positive rows."""
        uniform = self.own_negatives * world_size() / len(self.items)
        if self.log_q == "none":
            return torch.zeros((), device=row.device)
        if self.frequency is not None:
            if self.training:
                self.frequency.update(torch.where(chosen, keys, -1))
            expected = self.frequency(keys).float()
        else:
            expected = (chosen.sum() - int(self.refined)) * self.share[row.clamp(min=0)]
        return (expected + uniform).clamp(min=torch.finfo(torch.float32).tiny).log()

    def _losses(self, logits: Tensor, scores: Tensor, own: Tensor) -> Tensor:
        """[B]."""
        if not self.refined:
            return -logits.log_softmax(1).gather(1, own[:, None])[:, 0]
        positive = scores.gather(1, own[:, None])[:, 0]
        others = logits.scatter(1, own[:, None], -torch.inf).logsumexp(1)
        probability = torch.sigmoid(positive - others).detach()
        return torch.where(others == -torch.inf, 0.0, -(1 - probability) * (positive - others))


@dataclass(frozen=True)
class Candidates:
    """What a step scores: B rows of this rank against C candidates of all ranks.

    users: [B, K]. items: [C, K]. own: [B], each row's column. weight: [B], 0 for rows that are not positive. allowed: [B, C],
    what is not the same item in another column. log_expected: [C]. uniform: [C], drawn from the whole catalogue.
    """

    users: Tensor
    items: Tensor
    own: Tensor
    weight: Tensor
    allowed: Tensor
    log_expected: Tensor
    uniform: Tensor

    def output(self, scores: Tensor) -> Output:
        """The rows' own scores as logits [B, 1]."""
        return Output(scores.gather(1, self.own[:, None]), self.users, self.users[:, None])
