"""Facts about columns that are too long to hold: distinct values, distributions, and how much a column says of a label."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Counts = NDArray[np.float64]


class HashSample:
    """The hashes that begin with `bits` zero bits, of all that were added: all of them until there are more than `limit`.

    A uniform sample of the *values* (every row of a value is in it, or none), so that what share of values is in another
    sample or how often they repeat can be told from two samples without bias. distinct: keep each hash once.
    """

    def __init__(self, distinct: bool, limit: int = 1 << 19) -> None:
        self.bits = 0
        self.hashes: Hashes = np.empty(0, np.uint64)
        self._distinct = distinct
        self._limit = limit
        self._waiting: list[Hashes] = []
        self._num_waiting = 0

    def add(self, hashes: Hashes) -> None:
        """Take in the hashes of some rows."""
        hashes = self._sampled(np.unique(hashes) if self._distinct else hashes)
        if self._distinct:
            hashes = hashes[~is_in(hashes, self.hashes)]
        self._waiting.append(hashes)
        self._num_waiting += len(hashes)
        if self._num_waiting > self._limit // 4:
            self.finish()

    def finish(self) -> HashSample:
        """Sort what is waiting into `hashes`; call it before reading them."""
        together = np.concatenate([self.hashes, *self._waiting])
        self.hashes = np.unique(together) if self._distinct else np.sort(together)
        self._waiting, self._num_waiting = [], 0
        while len(self.hashes) > self._limit:
            self.thin(self.bits + 1)
        return self

    def thin(self, bits: int) -> None:
        """Keep the hashes with so many zero bits only."""
        self.bits = max(self.bits, bits)
        self.hashes = self._sampled(self.hashes)

    @property
    def count(self) -> int:
        """How many hashes there are, sampled or not; exact while `bits` is 0."""
        return len(self.hashes) << self.bits

    def unseen(self, hashes: Hashes) -> tuple[int, int]:
        """Of these hashes, how many could be in the sample, and how many of those are not."""
        sampled = self._sampled(hashes)
        return len(sampled), int(np.count_nonzero(~is_in(sampled, self.hashes)))

    def _sampled(self, hashes: Hashes) -> Hashes:
        return hashes if self.bits == 0 else hashes[hashes >> np.uint64(64 - self.bits) == 0]


def is_in(hashes: Hashes, known: Hashes) -> NDArray[np.bool_]:
    """Whether each hash is among the sorted `known`."""
    if len(known) == 0:
        return np.zeros(len(hashes), np.bool_)
    return known[np.minimum(np.searchsorted(known, hashes), len(known) - 1)] == hashes


def quantile_edges(values: NDArray[np.float64], buckets: int) -> NDArray[np.float64]:
    """Edges between about so many buckets of equal shares; a value that fills a share alone has a bucket of its own.

    A value is in the bucket `searchsorted(edges, value, side="right")`.
    """
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return np.empty(0)
    edges = np.quantile(values, np.linspace(0, 1, buckets), method="lower")
    frequent = edges[1:][np.diff(edges) == 0]
    return np.unique(np.concatenate([edges, np.nextafter(frequent, np.inf)]))


def stability_index(expected: Counts, found: Counts) -> float:
    """The population stability index (PSI) of two counts over the same buckets: 0 = the same shares, above 0.25 = another log.

    Half a row is added to each bucket that either of them has, so that none is infinite.
    """
    used = (expected > 0) | (found > 0)
    p = (expected[used] + 0.5) / (expected[used] + 0.5).sum()
    q = (found[used] + 0.5) / (found[used] + 0.5).sum()
    return float(((p - q) * np.log(p / q)).sum())


def noise_of_stability_index(expected: Counts, found: Counts) -> float:
    """What `stability_index` is on average for two samples of one distribution: (buckets - 1) (1/n + 1/m)."""
    return (np.count_nonzero(expected + found) - 1) * (1 / max(expected.sum(), 1) + 1 / max(found.sum(), 1))


class LabelScore:
    """How well one column alone predicts a label: it is cut into buckets, each half of the rows predicts the other half.

    `moments` [2, 3, buckets]: for even and odd rows the count of rows, of labels and of squared labels in each bucket.
    """

    def __init__(self, buckets: int) -> None:
        self.moments = np.zeros((2, 3, buckets))

    def add(self, bucket: NDArray[np.int64], label: NDArray[np.float64]) -> None:
        """Take in rows with a label: their buckets and labels [rows]."""
        for half in range(2):
            part, y = bucket[half::2], label[half::2]
            for power in range(3):
                self.moments[half, power] += np.bincount(part, y**power, self.moments.shape[2])

    def auc(self) -> float:
        """The AUC for a binary label, mean of both directions; NaN where a half has one class only."""
        return self._mean_of_halves(_bucket_auc)

    def explained(self) -> float:
        """The share of the label's variance that the column explains (R²), mean of both directions."""
        return self._mean_of_halves(_bucket_explained)

    def _mean_of_halves(self, score: Callable[[Counts, Counts], float]) -> float:
        results = []
        for own, other in ((0, 1), (1, 0)):
            count, total, _ = self.moments[other]
            prior = total.sum() / max(count.sum(), 1)
            results.append(score((total + prior) / (count + 1), self.moments[own]))
        return float(np.mean(results))


def _bucket_auc(score: Counts, moments: Counts) -> float:
    """The AUC of `score` [buckets] for the rows in `moments` [3, buckets]; buckets of one score are ties."""
    _, rank = np.unique(score, return_inverse=True)
    positives = np.bincount(rank, moments[1])
    negatives = np.bincount(rank, moments[0] - moments[1])
    pairs = positives.sum() * negatives.sum()
    below = np.cumsum(negatives) - negatives / 2
    return float((positives * below).sum() / pairs) if pairs > 0 else float("nan")


def _bucket_explained(score: Counts, moments: Counts) -> float:
    """1 - squared error of `score` [buckets] over the variance, for the rows in `moments` [3, buckets]."""
    count, total, squares = moments
    variance = squares.sum() - total.sum() ** 2 / max(count.sum(), 1)
    error = (squares - 2 * score * total + score**2 * count).sum()
    return float(1 - error / variance) if variance > 0 else float("nan")
