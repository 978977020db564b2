"""What each stage computes, apart from how it is deployed: users in, candidates or predictions out, many requests at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from raysys.bundle import ALLOWED_TARGETS, Bundle, to_predictions
from raysys.data.batch import Batch
from raysys.data.catalogue import encode_items
from raysys.data.sides import fill_other_sides, side_columns
from raysys.models.ranking.early_stage import EarlyStage, Encoded
from raysys.models.retrieval.base import RetrievalModel
from raysys.models.retrieval.indexes.index import NO_ITEM, Ids, Vectors
from raysys.schema import FeatureSchema, Side
from raysys.serve.release import ENCODED_ROWS, ITEMS, Release

USER_SIDES: tuple[Side, ...] = ("user", "context")


@dataclass(frozen=True)
class Call:
    """What a stage is asked. user: a row [1]. items: candidates that come in. exclude: items that must not come out.

    request_id: under which it may be logged.
    """

    version: str
    user: pa.Table
    count: int = 0
    items: Ids = field(default_factory=lambda: np.zeros(0, np.int64))
    exclude: Ids = field(default_factory=lambda: np.zeros(0, np.int64))
    request_id: str = ""


@dataclass(frozen=True)
class Candidates:
    """Items [n] of one user, best first, and their scores [n]: of retrieval, or logits of the early stage.

    user: [K] the retriever's vector of the user; [0] after the early stage.
    """

    ids: Ids
    scores: NDArray[np.float32]
    user: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))

    def cut(self, start: int, stop: int) -> Candidates:
        """Those from one place to another."""
        return Candidates(self.ids[start:stop], self.scores[start:stop], self.user)


@dataclass(frozen=True)
class Predictions:
    """values: [n, T] in the order of the call's items. tasks: T names. task: the column by which items are ordered."""

    values: NDArray[np.float64]
    tasks: tuple[str, ...]
    task: int


class Stage(Protocol):
    """What all three stages do."""

    def __init__(self, release: Release, threads: int = 1, allowed: Sequence[str] = ALLOWED_TARGETS) -> None: ...

    def answer(self, users: pa.Table, calls: Sequence[Call]) -> Sequence[Candidates | Predictions]:
        """The outcome of each of U calls. users: [U], their rows together. Raises UserError where one is at fault."""


class RetrieverStage:
    """Users' vectors, searched in the index."""

    def __init__(self, release: Release, threads: int = 1, allowed: Sequence[str] = ALLOWED_TARGETS) -> None:
        self._bundle = release.bundle("retriever", allowed)
        assert isinstance(self._bundle.model, RetrievalModel)
        self._model = self._bundle.model
        self._index = release.index(self._model, threads)

    def answer(self, users: pa.Table, calls: Sequence[Call]) -> list[Candidates]:
        """See `Stage.answer`: the best `count` items but those of `exclude`."""
        return self.retrieve(users, [call.count for call in calls], [call.exclude for call in calls])

    @torch.inference_mode()
    def retrieve(self, users: pa.Table, count: Sequence[int], exclude: Sequence[Ids]) -> list[Candidates]:
        """For users [U] (a row each) the best `count[u]` items that are not in `exclude[u]`; fewer where there are no more."""
        encoded = self._model.encode_users(self._model.embed(encode_users(self._bundle, users))).numpy()
        wanted = max(c + len(e) for c, e in zip(count, exclude, strict=True))
        ids, scores = self._index.search(encoded, min(wanted, max(len(self._index), 1)))
        results = []
        for row in range(len(users)):  # a loop over requests, not over items
            kept = np.flatnonzero((ids[row] != NO_ITEM) & ~np.isin(ids[row], exclude[row]))[: count[row]]
            results.append(Candidates(ids[row][kept], scores[row][kept], encoded[row]))
        return results


class EarlyRankerStage:
    """The early stage's order of candidates, from vectors of all items that are computed once."""

    def __init__(self, release: Release, threads: int = 1, allowed: Sequence[str] = ALLOWED_TARGETS) -> None:
        self._bundle = release.bundle("early_ranker", allowed)
        assert isinstance(self._bundle.model, EarlyStage)
        self._model = self._bundle.model
        self._task = self._bundle.schema.tasks.index(release.task)
        self._items = release.items()
        batch = encode_items(self._items.rows, self._bundle.schema, self._bundle.transforms, ITEMS)
        with torch.inference_mode():
            self._encoded = self._model.encode_items(self._model.embed(batch))

    def answer(self, users: pa.Table, calls: Sequence[Call]) -> list[Candidates]:
        """See `Stage.answer`: the best `count` of `items`."""
        return self.rank(users, [call.items for call in calls], [call.count for call in calls])

    @torch.inference_mode()
    def rank(self, users: pa.Table, candidates: Sequence[Ids], count: Sequence[int]) -> list[Candidates]:
        """For users [U] the best `count[u]` of their candidates, which the item table must have."""
        encoded = self._model.encode_users(self._model.embed(encode_users(self._bundle, users)))
        results = []
        for row, ids in enumerate(candidates):  # requests of different lengths
            place = torch.from_numpy(self._items.find(ids))
            user = Encoded(encoded.vectors[row : row + 1], encoded.biases[row : row + 1])
            items = Encoded(self._encoded.vectors[place], self._encoded.biases[place])
            logits = self._model.score(user, items)[0, self._task]
            best = logits.topk(min(count[row], len(ids)))
            results.append(Candidates(ids[best.indices.numpy()], best.values.numpy()))
        return results


class RankerStage:
    """The final ranker's calibrated predictions of user and item together."""

    def __init__(self, release: Release, threads: int = 1, allowed: Sequence[str] = ALLOWED_TARGETS) -> None:
        self._bundle = release.bundle("final_ranker", allowed)
        self._items = release.items()
        self.tasks = self._bundle.schema.tasks
        self._task = self.tasks.index(release.task)
        self.columns = side_columns(self._bundle.schema, "item")

    def answer(self, users: pa.Table, calls: Sequence[Call]) -> list[Predictions]:
        """See `Stage.answer`: predictions for `items`."""
        found = self.predict(users, [call.items for call in calls])
        return [Predictions(values.numpy(), self.tasks, self._task) for values in found]

    def predict(self, users: pa.Table, items: Sequence[Ids]) -> list[Tensor]:
        """For users [U] predictions [n_u, T] of their items, as `Bundle.predict` gives them.

        An item that the item table lacks is scored as an unknown one.
        """
        sizes = [len(ids) for ids in items]
        rows = self.rows(users, items)
        with torch.inference_mode():
            logits = self._bundle.model(self._bundle.transforms.to_batch(rows, labels=False)).logits
        predictions = to_predictions(logits, self._bundle.schema, self._bundle.calibrators)
        return list(predictions.split(sizes))

    def rows(self, users: pa.Table, items: Sequence[Ids]) -> pa.Table:
        """The raw rows that are scored: each user's columns beside those of each of its items."""
        schema = self._bundle.schema
        owner = np.repeat(np.arange(len(items)), [len(ids) for ids in items])
        rows = known_columns(users, schema).take(pa.array(owner))
        found = self._items.take(np.concatenate(items)).select(self.columns)
        for name, column in zip(self.columns, found.columns, strict=True):
            rows = rows.append_column(name, column)
        return fill_other_sides(rows, schema, *USER_SIDES, "item")


def encode_users(bundle: Bundle, users: pa.Table) -> Batch:
    """Users [U] as a batch without items."""
    rows = fill_other_sides(known_columns(users, bundle.schema), bundle.schema, *USER_SIDES)
    return bundle.transforms.to_batch(rows, labels=False)


def known_columns(users: pa.Table, schema: FeatureSchema) -> pa.Table:
    """The user and context columns of the schema; those that are not there are null: a user of whom nothing is known."""
    names = side_columns(schema, *USER_SIDES)
    given = set(users.column_names)
    return pa.table({name: users[name] if name in given else pa.nulls(len(users)) for name in names})


@torch.inference_mode()
def user_vectors(bundle: Bundle, users: pa.Table) -> Vectors:
    """Users [U] as a retriever encodes them where nothing is known of the context, [U, K]."""
    model, parts = bundle.model, []
    assert isinstance(model, RetrievalModel)
    for start in range(0, len(users), ENCODED_ROWS):
        batch = encode_users(bundle, users.slice(start, ENCODED_ROWS))
        parts.append(model.encode_users(model.embed(batch)))
    vectors: Vectors = torch.cat(parts).numpy()
    return vectors
