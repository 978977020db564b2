from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from raysys.data.hashing import hash_strings, mix, spread

MASK = 2**64 - 1


def split_mix(key: int, seed: int) -> int:
    key = (key + (seed + 1) * 0x9E3779B97F4A7C15) & MASK
    key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & MASK
    return key ^ (key >> 31)


def string_hash(value: bytes, seed: int) -> int:
    hashed = split_mix(len(value), seed)
    for start in range(0, len(value), 8):
        hashed = split_mix(hashed ^ int.from_bytes(value[start : start + 8], "little"), seed)
    return hashed


def hashed(values: list[bytes], seed: int = 0) -> list[int]:
    return hash_strings(pa.array(values, pa.large_binary()), seed).tolist()


def test_mix_is_split_mix_64():
    assert mix(np.array([0], np.uint64))[0] == 0xE220A8397B1DCDAF, "the published first value for seed 0"
    keys = np.random.default_rng(0).integers(0, 2**64, 100, dtype=np.uint64)
    for seed in (0, 1, 12345):
        assert mix(keys, seed).tolist() == [split_mix(int(key), seed) for key in keys]


def test_strings_are_hashed_by_all_their_bytes():
    rng = np.random.default_rng(0)
    values = [b"", b"a", b"\0", b"\0\0", b"abcdefgh", b"abcdefgh\0", "città".encode(), b"x" * 1000]
    values += [rng.bytes(int(length)) for length in rng.integers(0, 40, 200)]
    for seed in (0, 7):
        assert hashed(values, seed) == [string_hash(value, seed) for value in values]
    assert len(set(hashed(values))) == len(set(values))


def test_ids_of_old_models_stay_valid():
    """Constants written down once: another value here breaks every trained hash table."""
    assert hashed([b"", b"item 1", b"a longer string than one word"]) == [
        16294208416658607535,
        15138721686604218816,
        17003231235482447584,
    ]


def test_slices_and_empty_columns_of_strings():
    values = [b"one", b"", b"three is longer than a word", b"four"]
    array = pa.array(values, pa.large_binary())
    for start in range(5):
        for stop in range(start, 5):
            assert hash_strings(array[start:stop]).tolist() == [string_hash(value, 0) for value in values[start:stop]]


@pytest.mark.parametrize("size", [1, 2, 1000, 2**31 - 1, 2**32])
def test_spread_is_the_high_half_of_the_product(size):
    hashes = np.random.default_rng(0).integers(0, 2**64, 1000, dtype=np.uint64)
    hashes[:2] = 0, MASK
    assert spread(hashes, size).tolist() == [int(value) * size >> 64 for value in hashes]


def test_neighbouring_integers_go_to_unrelated_rows():
    ids = spread(mix(np.arange(100_000, dtype=np.uint64)), 64)
    together = np.histogram2d(ids[:-1], ids[1:], bins=64)[0]  # 4,096 cells of 24.4 on average
    # chi-square with 4,095 degrees of freedom: mean 4,095, deviation 90
    assert 3700 < ((together - 24.41) ** 2 / 24.41).sum() < 4500
