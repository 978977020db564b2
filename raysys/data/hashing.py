"""64-bit hashes of whole columns, the same on every machine and in every version: ids of `hash` tables depend on them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def mix(keys: NDArray[np.uint64], seed: int = 0) -> NDArray[np.uint64]:
    """SplitMix64 (Steele, Lea, Flood 2014) of each key: a bijection of 64 bits for every seed."""
    mixed = keys + np.uint64((seed + 1) * _GOLDEN & _MASK)
    shifted = mixed >> np.uint64(30)
    for multiplier, shift in ((0xBF58476D1CE4E5B9, 27), (0x94D049BB133111EB, 31)):
        mixed ^= shifted
        mixed *= np.uint64(multiplier)
        np.right_shift(mixed, np.uint64(shift), out=shifted)
    mixed ^= shifted
    return mixed


def hash_strings(strings: pa.LargeBinaryArray, seed: int = 0) -> NDArray[np.uint64]:
    """A hash of the bytes of each large_binary (no nulls): `mix` chained over its words of 8 bytes, from its length on."""
    offsets = np.frombuffer(strings.buffers()[1], np.int64)[strings.offset : strings.offset + len(strings) + 1]
    first, last = (int(offsets[0]), int(offsets[-1])) if len(strings) else (0, 0)
    padded = np.zeros(last - first + 8, np.uint8)
    if last > first:
        padded[:-8] = np.frombuffer(strings.buffers()[2], np.uint8)[first:last]
    words = np.ndarray((last - first + 1,), np.dtype("<u8"), padded, strides=(1,))  # a word from each byte on
    starts, lengths = offsets[:-1] - first, np.diff(offsets)
    hashes = mix(lengths.astype(np.uint64), seed)
    active = np.flatnonzero(lengths > 0)
    for position in range(0, int(lengths.max(initial=0)), 8):
        active = active[lengths[active] > position]
        unused = (8 * np.maximum(8 - (lengths[active] - position), 0)).astype(np.uint64)  # bits beyond the string's end
        word = words[starts[active] + position] << unused >> unused
        hashes[active] = mix(hashes[active] ^ word, seed)
    return hashes


def spread(hashes: NDArray[np.uint64], size: int) -> NDArray[np.int64]:
    """Ids in [0, size) by multiplication (Lemire 2019), size at most 2**32: floor(hash * size / 2**64), exactly."""
    high = hashes >> np.uint64(32)
    high *= np.uint64(size)
    low = hashes & np.uint64(0xFFFFFFFF)
    low *= np.uint64(size)
    low >>= np.uint64(32)
    high += low
    high >>= np.uint64(32)
    return high.view(np.int64)
