"""The next item at every position of a sequence: full softmax, sampled softmax, or one negative each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raysys.data.catalogue import NO_ROW, CatalogueItems
from raysys.errors import UserError, nearest
from raysys.models.outputs import Embedded, Output
from raysys.models.retrieval.sasrec import SASRec
from raysys.nn.collectives import global_sum, world_size
from raysys.nn.jagged import length_mask
from raysys.objectives.supervised import check_key, or_one
from raysys.schema import FeatureSchema

if TYPE_CHECKING:
    from raysys.data.batch import Batch
    from raysys.models.retrieval.base import RetrievalModel

Loss = Literal["full", "sampled", "bce"]


class NextItem(nn.Module):
    """The mean over all positions t of the global batch of the loss of the item after t, given h_t.

    A row's positions are the events of its history and, as the item after the last one, the row's own item where its label says
    yes. full: cross-entropy over the N items of the catalogue. sampled: over the item and `negatives` items drawn uniformly
    for the batch, whose scores are corrected by -log(negatives / N). bce: the log-loss of the item and of one drawn item that
    is not in the row (Kang and McAuley, 2018, eq. 7). Items that were never seen in training are in no loss but "full", where
    they only stand in the denominator.
    """

    def __init__(
        self, schema: FeatureSchema, *, items: CatalogueItems, loss: Loss = "full", negatives: int = 512
    ) -> None:
        super().__init__()
        if loss not in get_args(Loss):
            raise UserError(f"objective.loss is {loss!r}", nearest(str(loss), get_args(Loss)))
        check_key("negatives", negatives, negatives >= 1, "a positive whole number")
        self.items, self.task, self.loss, self.negatives = items, schema.tasks.index(items.task), loss, negatives
        feature = next(feature for feature in schema.sparse if feature.name == items.key)
        if feature.encoding == "hash":
            raise UserError(
                f"{schema.source}: {items.key!r} has encoding 'hash', where two items may be one",
                "give the table of the items the encoding vocab or index",
            )
        ids = items.batch.sparse[items.key].values().numpy()
        rows = np.full(schema.table(feature.table).num_embeddings, NO_ROW, np.int64)
        rows[ids] = np.arange(len(items))
        if feature.encoding == "vocab":
            rows[0] = NO_ROW
        self.row_of_id: Tensor
        self.register_buffer("row_of_id", torch.from_numpy(rows), persistent=False)

    def augment(self, batch: Batch, seed: int) -> Batch:
        """The batch with the items that scores are wanted of behind it: all, or those that are drawn."""
        if self.loss == "full":
            return self.items.append(batch)
        generator = torch.Generator().manual_seed(seed)
        return self.items.append(batch, torch.randint(len(self.items), (self.negatives,), generator=generator))

    def forward(
        self, model: RetrievalModel, batch: Batch, embedded: Embedded
    ) -> tuple[Tensor, Output, dict[str, Tensor]]:
        """Loss (this rank's share) and the share of positions whose item came first among its candidates."""
        if not isinstance(model, SASRec):
            raise UserError(
                f"NextItem learns from every event, and {type(model).__name__} has no such states", "model=sasrec"
            )
        rows = len(batch) - (len(self.items) if self.loss == "full" else self.negatives)  # B
        own = embedded.rows(0, rows)
        in_row, wanted, weight = self._targets(model, batch, rows)  # [B, L + 1], [B, L], [B, L]
        place = weight.nonzero(as_tuple=True)
        states = model.states(own)[place]  # [P, K]
        candidates = model.encode_items(embedded.rows(rows, len(batch)))  # [C, K]
        losses, first = self._losses(model, own, states, candidates, wanted[place], in_row, place, batch)
        total = or_one(global_sum(weight.sum()))
        loss, hits = (world_size() * (weight[place] * values).sum() / total for values in (losses, first))
        users = states.detach()
        return loss, Output(losses.detach()[:, None], users, users[:, None]), {"first": hits.detach()}

    def _targets(self, model: SASRec, batch: Batch, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Catalogue rows of all items of a row [B, L + 1] and of the item after each event [B, L], `NO_ROW` where there is none.

        And the weight of each position [B, L]: 0 where nothing is learned.
        """
        sequence = model.sequence
        assert batch.sequences is not None
        history = batch.sequences[sequence.features[0].name]
        length = history.lengths()[:rows, None].long()  # [B, 1]
        there = length_mask(length[:, 0], sequence.max_length)
        had = torch.full_like(there, NO_ROW, dtype=torch.int64).masked_scatter(there, self.row_of_id[history.values()])
        item = batch.sparse[self.items.key]
        present = item.lengths()[:rows] > 0
        last = torch.full_like(had[:, 0], NO_ROW)
        last[present] = self.row_of_id[item.values()[: int(present.sum())]]
        place = torch.arange(sequence.max_length, device=had.device)
        wanted = torch.where(place == length - 1, last[:, None], had.roll(-1, 1))
        positive = batch.labels[:rows, self.task, None] > 0
        learned = (place < length - 1) | ((place == length - 1) & positive)
        weight = batch.weight[:rows, self.task, None] * (learned & (wanted != NO_ROW))
        return torch.cat([had, last[:, None]], 1), wanted, weight

    def _losses(
        self,
        model: SASRec,
        own: Embedded,
        states: Tensor,
        candidates: Tensor,
        wanted: Tensor,
        in_row: Tensor,
        place: tuple[Tensor, ...],
        batch: Batch,
    ) -> tuple[Tensor, Tensor]:
        """[P] losses, and whether the item has the highest score of its candidates."""
        if self.loss == "full":
            logits = states @ candidates.t()  # [P, N]
            return F.cross_entropy(logits, wanted, reduction="none"), (logits.argmax(1) == wanted).float()
        events = own.sequences[model.sequence.name][0]  # [B, L, K]
        last = place[1] == own.sequences[model.sequence.name][1].sum(1)[place[0]] - 1
        following = torch.cat([events[:, 1:], events[:, :1]], 1)[place]
        positive = torch.where(last[:, None], own.tokens[place[0], 0], following)  # [P, K]
        score = (states * positive).sum(1)
        drawn = self.row_of_id[batch.sparse[self.items.key].values()[-self.negatives :]]  # [M] catalogue rows
        others = states @ candidates.t()  # [P, M]
        if self.loss == "sampled":
            others = others - float(np.log(len(drawn) / len(self.items)))
            others = others.masked_fill((drawn == NO_ROW) | (drawn == wanted[:, None]), -torch.inf)
            both = torch.cat([score[:, None], others], 1)
            return -both.log_softmax(1)[:, 0], (both.argmax(1) == 0).float()
        one = torch.arange(len(score), device=score.device) % len(drawn)
        clash = (drawn[one] == NO_ROW) | (in_row[place[0]] == drawn[one][:, None]).any(1)
        negative = others.gather(1, one[:, None])[:, 0]
        losses = F.softplus(-score) + F.softplus(negative).masked_fill(clash, 0.0)
        return losses, (score > negative).float()
