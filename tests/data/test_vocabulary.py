from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from raysys.data import vocabulary
from raysys.data.vocabulary import ValueCounter, Vocabulary


def expected(values: list, asked: list) -> list[int]:
    ids = {value: number + 1 for number, value in enumerate(values)}
    return [ids.get(value, 0) for value in asked]


@pytest.mark.parametrize("size", [1, 2, 3, 100, 5000])
def test_integers(size):
    rng = np.random.default_rng(size)
    values = list(dict.fromkeys(rng.integers(-(2**62), 2**62, size).tolist() + list(range(-size, size))))
    rng.shuffle(values)
    values = values[:size]
    asked = [*values, *rng.integers(-(2**62), 2**62, 100).tolist(), *range(-10, 10), None]
    assert Vocabulary(pa.array(values)).lookup(pa.array(asked)).tolist() == expected(values, asked)


@pytest.mark.parametrize("size", [1, 2, 3, 100, 5000])
def test_strings(size):
    values = [f"value {number}" for number in range(size)]
    asked = [*values[::-1], None, "", "value", *values, "value 0 ", *(f"other {number}" for number in range(100))]
    found = Vocabulary(pa.array(values))
    assert found.lookup(pa.array(asked)).tolist() == expected(values, asked)
    assert found.lookup(pa.array(asked, pa.large_string())[3:]).tolist() == expected(values, asked[3:])
    assert found.lookup(pa.array([value and value.encode() for value in asked])).tolist() == expected(values, asked)


def test_strings_of_one_hash_are_told_apart(monkeypatch):
    """A hash that sees the length only, and with seed 1 the first byte too: it must be tried, and unknown values found out."""

    def by_length(array: pa.Array, seed: int) -> np.ndarray:
        lengths = [len(value) << 32 | (value[0] if seed else 0) for value in array.to_pylist()]
        return np.array(lengths, np.uint64)

    monkeypatch.setattr(vocabulary, "hash_strings", by_length)
    values = ["aa", "ba", "ccc"]
    asked = ["aa", "ba", "ccc", "ab", "bb", "ccd", "dd"]
    assert Vocabulary(pa.array(values)).lookup(pa.array(asked)).tolist() == expected(values, asked)


def test_full_neighbourhoods_of_the_table(monkeypatch):
    """With hashes that all start with the same bits every look-up has to walk."""
    monkeypatch.setattr(vocabulary, "mix", lambda keys: keys | np.uint64(2**64 - 2**40))
    values, asked = list(range(0, 400, 2)), list(range(401))
    assert Vocabulary(pa.array(values)).lookup(pa.array(asked)).tolist() == expected(values, asked)


def test_nothing_known_and_nothing_asked():
    empty = Vocabulary(pa.array([], pa.int64()))
    assert empty.lookup(pa.array(["a", None])).tolist() == [0, 0]
    assert Vocabulary(pa.array(["a"])).lookup(pa.nulls(2)).tolist() == [0, 0]
    assert Vocabulary(pa.array(["a"])).lookup(pa.array([], pa.string())).tolist() == []


@pytest.mark.parametrize("merge_rows", [1, 50, 10**6])
def test_counts_do_not_depend_on_when_they_are_merged(monkeypatch, merge_rows):
    monkeypatch.setattr(vocabulary, "_MERGE_ROWS", merge_rows)
    rng = np.random.default_rng(0)
    batches = [[*(rng.zipf(1.3, 200) % 300).tolist(), None] for _ in range(20)]
    counter = ValueCounter()
    for kind, batch in zip([pa.int64(), pa.int32()] * 10, batches, strict=True):
        counter.add(pa.array(batch, kind))
    counts = Counter(value for batch in batches for value in batch if value is not None)
    ranked = sorted(counts, key=lambda value: (-counts[value], value))
    for limit in (0, 1, 10, 1000):
        assert counter.most_frequent(limit).to_pylist() == ranked[:limit]
