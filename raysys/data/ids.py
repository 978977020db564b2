"""Sparse features and sequences: from Arrow columns of ids and lists of ids to jagged row numbers of embedding tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raysys.data.columns import Source, flatten, integers, is_list, is_text, numbers, present, ranges, text
from raysys.data.hashing import hash_strings, mix, spread
from raysys.data.rows import Jagged
from raysys.data.vocabulary import Vocabulary
from raysys.errors import UserError
from raysys.schema import Encoding, Sequence, SparseFeature


@dataclass(frozen=True)
class IdTable:
    """How the values of all columns that share an embedding table become its row numbers."""

    name: str
    num_embeddings: int
    encoding: Encoding
    seed: int
    vocabulary: Vocabulary | None

    def ids(self, values: pa.Array) -> NDArray[np.int64]:
        """An id per value; `index` ids are not checked here, and a null has an id in a vocabulary only."""
        if self.encoding == "index":
            return integers(values)
        if self.encoding == "vocab":
            assert self.vocabulary is not None, f"table {self.name} was not fitted"
            return self.vocabulary.lookup(values)
        if is_text(values):
            return spread(hash_strings(text(values), self.seed), self.num_embeddings)
        return spread(mix(integers(values).view(np.uint64), self.seed), self.num_embeddings)


@dataclass
class _Ids:
    """The ids of a column while they are cut and cleaned: values [N], lengths [n], where wanted weights [N]."""

    values: pa.Array
    lengths: NDArray[np.int64]
    weights: NDArray[np.float32] | None = None

    def keep_last(self, max_length: int) -> None:
        if self.lengths.max(initial=0) > max_length:
            kept = np.minimum(self.lengths, max_length)
            last = ranges(np.cumsum(self.lengths) - kept, kept)
            self.values, self.lengths = self.values.take(pa.array(last)), kept
            self.weights = None if self.weights is None else self.weights[last]

    def drop_nulls(self) -> None:
        valid = present(self.values)
        if valid is not None:
            self.lengths = np.bincount(self.owners()[valid], minlength=len(self.lengths))
            self.values = self.values.drop_null()
            self.weights = None if self.weights is None else self.weights[valid]

    def owners(self) -> NDArray[np.int64]:
        """The row of each value."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)


def encode_single(feature: SparseFeature, column: pa.Array, table: IdTable, source: Source) -> NDArray[np.int64]:
    """One id per row [n]; a null is id 0 of a vocabulary and -1, no id, with other encodings."""
    valid = present(column)
    if valid is None or table.encoding == "vocab":
        return _encode(column, feature.name, table, lambda element: source.at(element))
    ids = np.full(len(column), -1)
    rows = np.flatnonzero(valid)
    ids[rows] = _encode(column.drop_null(), feature.name, table, lambda element: source.at(int(rows[element])))
    return ids


def encode_bag(feature: SparseFeature, columns: Mapping[str, pa.Array], table: IdTable, source: Source) -> Jagged:
    """A list of ids per row, of which the last `max_length` are kept.

    A null list is empty. A null id is id 0 of a vocabulary; with other encodings it is left out.
    """
    ids = _elements(columns[feature.name])
    if feature.weights is not None:
        ids.weights = _bag_weights(feature, columns[feature.weights], ids, source)
    ids.keep_last(feature.max_length)
    if table.encoding != "vocab":
        ids.drop_nulls()
    if ids.weights is not None and not np.isfinite(ids.weights).all():
        row = int(ids.owners()[np.argmin(np.isfinite(ids.weights))])
        what = (
            f"weight column {feature.weights!r} of {feature.name!r} holds {columns[str(feature.weights)][row].as_py()}"
        )
        raise UserError(f"{source.at(row)}: {what}, expected finite numbers", "give every id of the bag a weight")
    return _jagged(ids, feature.name, table, source)


def encode_sequence(
    sequence: Sequence, columns: Mapping[str, pa.Array], tables: Mapping[str, IdTable], source: Source
) -> dict[str, Jagged]:
    """The columns of a sequence, of which the last `max_length` events are kept; all have the same lengths."""
    events = {feature.name: _elements(columns[feature.name]) for feature in sequence.features}
    _check_lengths(f"sequence {sequence.name!r}", events, source)
    encoded = {}
    for feature in sequence.features:
        ids = events[feature.name]
        ids.keep_last(sequence.max_length)
        valid = present(ids.values)
        if valid is not None and feature.encoding != "vocab":
            place = source.at(int(ids.owners()[np.argmin(valid)]))
            raise UserError(
                f"{place}: column {feature.name!r} of sequence {sequence.name!r} has a null inside a list",
                "an event needs an id in every column; encoding vocab reads a null as out of vocabulary",
            )
        encoded[feature.name] = _jagged(ids, feature.name, tables[feature.table], source)
    return encoded


def encode_list(column: pa.Array) -> Jagged:
    """A list column of integers as it is; nulls are left out."""
    ids = _elements(column)
    ids.drop_nulls()
    return Jagged(integers(ids.values), ids.lengths)


def _elements(column: pa.Array) -> _Ids:
    if is_list(column.type):
        return _Ids(*flatten(column))
    if pa.types.is_null(column.type):  # lists that are all null
        return _Ids(column[:0], np.zeros(len(column), np.int64))
    return _Ids(column, np.ones(len(column), np.int64))


def _jagged(ids: _Ids, name: str, table: IdTable, source: Source) -> Jagged:
    encoded = _encode(ids.values, name, table, lambda element: source.at(int(ids.owners()[element])))
    return Jagged(encoded, ids.lengths, ids.weights)


def _encode(values: pa.Array, name: str, table: IdTable, place: Callable[[int], str]) -> NDArray[np.int64]:
    """The ids of values; `place` says where a value comes from, for the error of one that is out of range."""
    encoded = table.ids(values)
    if table.encoding == "index" and len(encoded) and (encoded.min() < 0 or encoded.max() >= table.num_embeddings):
        element = int(np.argmax((encoded < 0) | (encoded >= table.num_embeddings)))
        raise UserError(
            f"{place(element)}: column {name!r} holds id {values[element].as_py()}, but table {table.name!r} has "
            f"num_embeddings {table.num_embeddings}",
            f"ids from 0 to {table.num_embeddings - 1} are expected: raise num_embeddings, or use encoding hash or vocab",
        )
    return encoded


def _bag_weights(feature: SparseFeature, column: pa.Array, ids: _Ids, source: Source) -> NDArray[np.float32]:
    weights = _elements(column)
    _check_lengths(f"bag {feature.name!r}", {feature.name: ids, str(feature.weights): weights}, source)
    return numbers(weights.values).astype(np.float32)


def _check_lengths(what: str, columns: Mapping[str, _Ids], source: Source) -> None:
    first = next(iter(columns.values())).lengths
    for column in columns.values():
        if not np.array_equal(first, column.lengths):
            row = int(np.argmax(first != column.lengths))
            found = ", ".join(f"{name} {ids.lengths[row]}" for name, ids in columns.items())
            raise UserError(
                f"{source.at(row)}: {what} has columns of unequal lengths: {found}",
                "its columns describe the same events: write lists of one length",
            )
