"""Vocabularies: the most frequent values of a column as ids, looked up for whole columns at once."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raysys.data.columns import integers, is_text, text
from raysys.data.hashing import hash_strings, mix

_MERGE_ROWS = 1 << 20  # value counts are merged when this many have piled up


class Vocabulary:
    """Distinct values (integers or strings, none null) and their ids: id i > 0 is values[i - 1], 0 any other value.

    The index is a hash table with linear probing, built once in numpy, so that a look-up is a few gathers for the
    whole column instead of a table built for each batch (as Arrow's `index_in` does) or a binary search.
    """

    def __init__(self, values: pa.Array) -> None:
        self.values = values
        self._is_text = is_text(values)
        self._values = text(values) if self._is_text else values
        self._seed = 0
        hashes = self._hash(values)
        while len(np.unique(hashes)) < len(hashes):  # two values of one 64-bit hash: another seed parts them
            self._seed += 1
            hashes = self._hash(values)
        bits = max(1, (2 * len(hashes)).bit_length())
        self._shift = np.uint64(64 - bits)
        homes = (hashes >> self._shift).view(np.int64)
        order = np.argsort(homes, kind="stable")
        count = np.arange(len(hashes))
        slots = count + np.maximum.accumulate(
            homes[order] - count
        )  # each value in the first free slot from its home on
        size = max(2**bits, int(slots.max(initial=0)) + 1) + 1  # the last slot stays empty: every probe ends
        self._slot_hashes = np.zeros(size, np.uint64)
        self._slot_ids = np.zeros(size, np.uint32)  # 0 = an empty slot
        self._slot_hashes[slots] = hashes[order]
        self._slot_ids[slots] = order + 1

    def __len__(self) -> int:
        return len(self.values)

    def lookup(self, array: pa.Array) -> NDArray[np.int64]:
        """The id of each value; 0 for a null or an unknown one. Numbers are asked of numbers, text of text."""
        if array.null_count == len(array) or len(self) == 0:
            return np.zeros(len(array), np.int64)
        assert is_text(array) == is_text(self.values), f"{array.type} looked up in {self.values.type}"
        if self._is_text:
            encoded = array.dictionary_encode()
            ids = np.append(self._lookup_text(text(encoded.dictionary)), 0)
            return ids[pc.fill_null(encoded.indices, len(ids) - 1).to_numpy()]
        ids = self._probe(self._hash(array))
        if array.null_count:
            ids[array.is_null().to_numpy(zero_copy_only=False)] = 0
        return ids

    def _lookup_text(self, array: pa.LargeBinaryArray) -> NDArray[np.int64]:
        ids = self._probe(hash_strings(array, self._seed))
        found = np.flatnonzero(ids)
        same = pc.equal(self._values.take(pa.array(ids[found] - 1)), array.take(pa.array(found)))
        ids[found[~same.to_numpy(zero_copy_only=False)]] = 0  # an unknown string with the hash of a known one
        return ids

    def _hash(self, array: pa.Array) -> NDArray[np.uint64]:
        if is_text(array):
            return hash_strings(text(array), self._seed)
        return mix(integers(array).view(np.uint64))  # a bijection: numbers of one hash are equal

    def _probe(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        slots = (hashes >> self._shift).view(np.int64)
        same = self._slot_hashes.take(slots) == hashes
        found = self._slot_ids.take(slots)
        ids = (found * same).astype(np.int64)
        pending = np.flatnonzero(~same & (found > 0))
        while len(pending):
            slots[pending] += 1
            nearby = slots[pending]
            same = self._slot_hashes.take(nearby) == hashes[pending]
            found = self._slot_ids.take(nearby)
            ids[pending[same]] = found[same]
            pending = pending[~same & (found > 0)]
        return ids


class ValueCounter:
    """How often each value was seen, over any number of columns and batches."""

    def __init__(self) -> None:
        self._pieces: list[pa.Table] = []
        self._merged_rows = 0

    def add(self, array: pa.Array) -> None:
        """Count the values of an array of numbers or of text; nulls are left out."""
        array = array.drop_null()
        if not len(array):
            return
        array = text(array) if is_text(array) else pa.array(integers(array))
        counts = array.value_counts()
        self._pieces.append(pa.table({"value": counts.field(0), "count": counts.field(1)}))
        if sum(map(len, self._pieces)) > self._merged_rows + max(_MERGE_ROWS, self._merged_rows):
            self._merge()

    def most_frequent(self, limit: int) -> pa.Array:
        """At most `limit` values, the most frequent first, ties by value."""
        if not self._pieces:
            return pa.array([], pa.int64())
        self._merge()
        order = [("count", "descending"), ("value", "ascending")]
        return self._pieces[0].sort_by(order)["value"].slice(0, limit).combine_chunks()

    def _merge(self) -> None:
        merged = pa.concat_tables(self._pieces).group_by("value").aggregate([("count", "sum")])
        self._pieces = [merged.rename_columns({"value": "value", "count_sum": "count"})]
        self._merged_rows = len(merged)
