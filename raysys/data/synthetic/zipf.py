"""Ids with a power-law distribution, and four hidden numbers for each id."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

FACTORS = 4
"""Hidden numbers per id: the four 16-bit parts of one 64-bit hash."""
HEAD = 65_536
"""Ids whose share of the rows is summed exactly; all others together behave like their population (error < 2e-4)."""

Floats = NDArray[np.floating]


def power_law_ids(uniform: Floats, top: float, exponent: float) -> NDArray[np.int64]:
    """Ids floor(x) - 1 where x in [1, top) has a density proportional to x ** -exponent; `uniform` is in [0, 1)."""
    power = 1 - exponent
    x = top**uniform if power == 0 else ((top**power - 1) * uniform + 1) ** (1 / power)
    # Rounding can push x to either end of its range, or just over it.
    return (x.astype(np.int64) - 1).clip(0, int(top) - 2)


def head_shares(cardinality: int, exponent: float) -> Floats:
    """The probability of each of the first `HEAD` ids of `power_law_ids(uniform, cardinality + 1, exponent)`."""
    top = cardinality + 1.0
    edges = np.arange(1.0, min(cardinality, HEAD) + 2)
    if exponent == 1:
        return np.diff(np.log(edges) / np.log(top))
    return np.diff((edges ** (1 - exponent) - 1) / (top ** (1 - exponent) - 1))


class IdFactors:
    """Four numbers for each id of a field, from a hash of (seed, field, id): no memory, however many ids there are.

    They are uniform with variance 1 over the ids, then shifted to mean 0 over the rows of a log, where few ids make up
    most rows. `covariance` [4, 4] is that over the rows.
    """

    def __init__(self, seed: int, field: str, cardinality: int, exponent: float) -> None:
        digest = hashlib.blake2b(f"{seed}/{field}".encode(), digest_size=8).digest()
        self._salt = np.uint64(int.from_bytes(digest, "little"))
        self._shift = np.zeros((FACTORS, 1), np.float32)
        shares = head_shares(cardinality, exponent)  # [head]
        head = self(np.arange(len(shares))).astype(np.float64)  # [4, head]
        mean = head @ shares
        tail = max(1 - shares.sum(), 0.0)
        self.covariance = (head * shares) @ head.T + tail * np.eye(FACTORS) - np.outer(mean, mean)
        self._shift = mean[:, None].astype(np.float32)

    def __call__(self, ids: NDArray[np.integer]) -> NDArray[np.float32]:
        """[4, N] for ids [N]; a missing id, -1, gets zeros."""
        parts = _hash(ids, self._salt).view(np.uint16).reshape(-1, FACTORS).T  # [4, N]
        scale = np.float32(np.sqrt(12 / (2.0**32 - 1)))  # 65,536 equal steps of this width have variance 1
        factors = parts * scale  # [4, N] float32
        factors -= self._shift + np.float32(32767.5) * scale
        if (missing := ids < 0).any():
            factors[:, missing] = 0
        return factors


def _hash(ids: NDArray[np.integer], salt: np.uint64) -> NDArray[np.uint64]:
    """The ids through the mixing function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), as a counter."""
    x = ids.astype(np.uint64)
    x *= np.uint64(0x9E3779B97F4A7C15)
    x += salt
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x ^= x >> np.uint64(shift)
        x *= np.uint64(factor)
    x ^= x >> np.uint64(31)
    return x
