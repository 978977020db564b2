"""What every retrieval model has: users and items become vectors apart from each other, and a score for each pair of them."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from raysys.data.batch import Batch
from raysys.errors import UserError
from raysys.models.embeddings import Embeddings
from raysys.models.outputs import Embedded, Output
from raysys.schema import FeatureSchema

BLOCK_SCORES = 1 << 24
"""Scores that are held at a time where a whole catalogue is scored: 64 MiB."""


class RetrievalModel(nn.Module, ABC):
    """A user's vector is computed once a request, an item's once a catalogue.

    The three steps of a ranking model hold, too: `shared` [B, 2K] is the user's and the item's vector of each row side by
    side, and its one logit is the score of that pair. A subclass sets `embeddings`.
    """

    embeddings: Embeddings
    width: int
    """Columns K of both vectors."""

    pair_width: int = 1
    """Numbers that are held for each pair while it is scored."""

    def embed(self, batch: Batch) -> Embedded:
        """The embedding lookup, the only step that a trainer shards."""
        return self.embeddings(batch)

    @abstractmethod
    def encode_users(self, embedded: Embedded) -> Tensor:
        """[R, K]. What a row says of an item is not read."""

    @abstractmethod
    def encode_items(self, embedded: Embedded) -> Tensor:
        """[R, K]. What a row says of a user or a context is not read."""

    def score(self, users: Tensor, items: Tensor) -> Tensor:
        """Scores [R, C] of C items for each of R users, in the order of which items are retrieved: the inner product."""
        return users @ items.t()

    def score_rows(self, users: Tensor, items: Tensor) -> Tensor:
        """[R] scores of pairs, as the diagonal of `score`."""
        return (users * items).sum(1)

    def interact(self, embedded: Embedded) -> Tensor:
        """[B, 2K]: the vectors of the row's user and of its item."""
        return torch.cat([self.encode_users(embedded), self.encode_items(embedded)], 1)

    def predict(self, shared: Tensor) -> Output:
        """Logits [B, 1]: the score of each row's pair, as it is (no probability)."""
        users, items = shared.split(self.width, 1)
        logits = self.score_rows(users, items)[:, None]
        return Output(logits=logits, shared=shared, hidden=(users * items)[:, None])

    def forward(self, batch: Batch) -> Output:
        """The three steps in a row."""
        embedded = self.embed(batch)
        output = self.predict(self.interact(embedded))
        output.embedded = embedded
        return output


def scores_in_blocks(model: RetrievalModel, users: Tensor, items: Tensor) -> Tensor:
    """`model.score` with at most `BLOCK_SCORES` pairs at a time: what lies between the pair and its score may be wide."""
    step = max(1, BLOCK_SCORES // (max(len(users), 1) * model.pair_width))
    return torch.cat([model.score(users, items[start : start + step]) for start in range(0, len(items), step)], 1)


def key_feature(schema: FeatureSchema) -> str:
    """The sparse feature of single ids that tells items apart: the catalogue's key."""
    singles = [f.name for f in schema.sparse if f.side == "item" and f.max_length == 1]
    if schema.catalogue is None or schema.catalogue.key not in singles:
        raise UserError(
            f"{schema.source}: the catalogue's key is no single id among the item features",
            "name it in sparse with side: item",
        )
    return schema.catalogue.key
