"""What is known of one column of a log after its splits went by, batch by batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raysys.data.columns import flatten, integers, is_text, kind_of, numbers, seconds, text
from raysys.data.hashing import hash_strings, mix
from raysys.data.sketches import Counts, Hashes, HashSample, LabelScore, quantile_edges, stability_index
from raysys.schema import FeatureSchema

NUMBER_BUCKETS = 64  # about equal shares of the first batch of train
ID_BUCKETS = 256  # by hash
Use = Literal["ids", "number", "label", "weight", "time", "vector"]


@dataclass(frozen=True)
class Column:
    """A column and what the schema uses it for: `role` in words, `use` as far as its checks go, `table` of ids."""

    name: str
    role: str
    use: Use
    table: str | None = None


@dataclass
class SplitFacts:
    """One column in one split. low, high: of numbers, times (seconds) and integer ids.

    not_finite: NaN and infinite values. not_binary: labels that are neither 0 nor 1. buckets: rows in each bucket.
    """

    rows: int = 0
    nulls: int = 0
    not_finite: int = 0
    not_binary: int = 0
    low: float = math.inf
    high: float = -math.inf
    ids: int = 0
    known_ids: int = 0
    unseen_ids: int = 0
    buckets: Counts = field(default_factory=lambda: np.zeros(0))

    @property
    def unseen_share(self) -> float:
        """The share of ids (occurrences) that no row of train has; NaN without ids."""
        return self.unseen_ids / self.known_ids if self.known_ids else math.nan


class ColumnFacts:
    """Facts by split, and what the column alone says of each label in train, which must come first.

    distinct: the sample of the values of the column's table, shared by the columns that share the table.
    """

    def __init__(self, column: Column, tasks: tuple[str, ...], distinct: HashSample | None) -> None:
        self.column = column
        self.splits: dict[str, SplitFacts] = {}
        self.distinct = distinct
        self._tasks = tasks
        self._edges: NDArray[np.float64] | None = np.array([0.5]) if column.use == "label" else None
        self.scores: dict[str, LabelScore] = {}

    def add(self, split: str, array: pa.Array, labels: dict[str, NDArray[np.float64]]) -> None:
        """Take in a batch of a split. labels: [rows] of each task, NaN where missing; a regression label as its rank."""
        facts = self.splits.setdefault(split, SplitFacts())
        facts.rows += len(array)
        facts.nulls += array.null_count
        if self.column.use == "vector":
            return
        buckets, count = (
            self._add_ids(facts, split, array) if self.column.use == "ids" else self._add_numbers(facts, array)
        )
        if self.column.use == "time":
            return
        if not len(facts.buckets):
            facts.buckets = np.zeros(count)
        facts.buckets += np.bincount(buckets, minlength=count)
        if split == "train" and self.column.use in ("ids", "number"):
            for task in self._tasks:
                known = ~np.isnan(labels[task])
                self.scores.setdefault(task, LabelScore(count)).add(buckets[known], labels[task][known])

    def drift(self, split: str) -> float:
        """The PSI of a split against train; NaN where either has no such column."""
        own, train = self.splits.get(split), self.splits.get("train")
        if own is None or train is None or not len(own.buckets) or not len(train.buckets):
            return math.nan
        return stability_index(train.buckets, own.buckets)

    def score(self, task: str, schema: FeatureSchema) -> float:
        """How well the column alone predicts a label of train: AUC if that is binary, else R² of its rank; NaN where it was not looked at."""
        if task not in self.scores:
            return math.nan
        binary = schema.labels[schema.tasks.index(task)].kind == "binary"
        return self.scores[task].auc() if binary else self.scores[task].explained()

    def _add_numbers(self, facts: SplitFacts, array: pa.Array) -> tuple[NDArray[np.int64], int]:
        """The bucket of each row; the last one is for nulls."""
        if self.column.use == "time":
            values = np.where(array.is_valid().to_numpy(zero_copy_only=False), seconds(array), np.nan)
        else:
            values = numbers(array).astype(np.float64)
        finite = np.isfinite(values)
        facts.not_finite += len(values) - int(np.count_nonzero(finite)) - array.null_count
        if finite.any():
            facts.low, facts.high = min(facts.low, values[finite].min()), max(facts.high, values[finite].max())
        facts.not_binary += int(np.count_nonzero(finite & ~np.isin(values, (0, 1))))
        if self._edges is None:
            self._edges = quantile_edges(values, NUMBER_BUCKETS)
        last = len(self._edges) + 1
        return np.where(finite, np.searchsorted(self._edges, values, side="right"), last), last + 1

    def _add_ids(self, facts: SplitFacts, split: str, array: pa.Array) -> tuple[NDArray[np.int64], int]:
        """The bucket of each row, by the hash of its (last) id; the last bucket is for rows without any."""
        assert self.distinct is not None
        _, is_list = kind_of(array.type)
        if is_list:
            elements, lengths = flatten(array)
            ends = np.cumsum(lengths)
        else:
            elements, lengths, ends = array, np.ones(len(array), np.int64), np.arange(1, len(array) + 1)
        valid = elements.is_valid().to_numpy(zero_copy_only=False)
        hashes = hash_values(elements)
        present = hashes[valid]
        facts.ids += len(present)
        if len(present) and not is_text(elements):
            values = integers(elements)[valid]
            facts.low, facts.high = min(facts.low, float(values.min())), max(facts.high, float(values.max()))
        if split == "train":
            self.distinct.add(present)
        else:
            known, unseen = self.distinct.unseen(present)
            facts.known_ids, facts.unseen_ids = facts.known_ids + known, facts.unseen_ids + unseen
        buckets = np.full(len(array), ID_BUCKETS)
        filled = np.flatnonzero(lengths > 0)
        last = ends[filled] - 1
        filled, last = filled[valid[last]], last[valid[last]]
        buckets[filled] = (hashes[last] & np.uint64(ID_BUCKETS - 1)).astype(np.int64)
        return buckets, ID_BUCKETS + 1


def hash_values(array: pa.Array) -> Hashes:
    """A hash of each integer or string; of a null, any."""
    if is_text(array):
        return hash_strings(text(array).fill_null(b""))
    return mix(integers(array).view(np.uint64))


def columns_of(schema: FeatureSchema) -> list[Column]:
    """The columns to look at, each once, in the order of the schema; `example_id` and `group_id` are no such columns."""
    columns = [Column(feature.name, "dense", "number") for feature in schema.dense]
    for feature in schema.id_features:
        columns.append(Column(feature.name, f"{feature.encoding} in {feature.table}", "ids", feature.table))
    for extra in schema.extra:
        if extra.kind != "ids":
            columns.append(Column(extra.name, f"extra {extra.kind}", "vector" if extra.kind == "vector" else "number"))
    columns += [Column(label.name, f"{label.kind} label", "label") for label in schema.labels]
    columns += [
        Column(name, "bag weights", "vector") for name in (feature.weights for feature in schema.weighted) if name
    ]
    weights = [*(label.weight for label in schema.labels), schema.weight]
    columns += [Column(name, "weight", "weight") for name in weights if name]
    columns += [Column(schema.time, "time", "time")] if schema.time else []
    return list({column.name: column for column in reversed(columns)}.values())[::-1]
