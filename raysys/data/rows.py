"""Encoded rows in numpy, which are permuted and cut before they become a `Batch`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysys.data.columns import ranges


class Jagged:
    """A list of ids for each of n rows: values [N], lengths [n], where wanted a weight per value [N]."""

    def __init__(
        self, values: NDArray[np.int64], lengths: NDArray[np.int64], weights: NDArray[np.float32] | None = None
    ) -> None:
        self.values = values
        self.lengths = lengths
        self.weights = weights
        self.offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=self.offsets[1:])

    def span(self, start: int, stop: int) -> slice:
        """Where the values of rows [start, stop) are."""
        return slice(self.offsets[start], self.offsets[stop])

    def slice(self, start: int, stop: int) -> Jagged:
        """Rows [start, stop), without a copy of the values."""
        span = self.span(start, stop)
        return Jagged(self.values[span], self.lengths[start:stop], None if self.weights is None else self.weights[span])

    def take(self, order: NDArray[np.int64]) -> Jagged:
        """The rows of these numbers, in this order."""
        lengths = self.lengths.take(order)
        elements = ranges(self.offsets.take(order), lengths)
        return Jagged(
            self.values.take(elements), lengths, None if self.weights is None else self.weights.take(elements)
        )

    @staticmethod
    def concatenate(parts: Sequence[Jagged]) -> Jagged:
        """The rows of several, one after another."""
        weights = [part.weights for part in parts if part.weights is not None]
        return Jagged(
            np.concatenate([part.values for part in parts]),
            np.concatenate([part.lengths for part in parts]),
            np.concatenate(weights) if weights else None,
        )


@dataclass(eq=False)
class Rows:
    """n encoded rows.

    arrays: by the name of their field in `Batch`, [n, …]. extra: extra columns by name, [n, …].
    ids: [F, n], the features with at most one id per row (-1: none), in the order of `Transforms.single`.
    bags: all other sparse features and the sequence features, by name. extra_bags: extra columns of kind `ids`.
    """

    num_rows: int
    arrays: dict[str, NDArray[Any]]
    ids: NDArray[np.int64]
    bags: dict[str, Jagged]
    extra: dict[str, NDArray[Any]]
    extra_bags: dict[str, Jagged]

    def __len__(self) -> int:
        return self.num_rows

    def slice(self, start: int, stop: int) -> Rows:
        """Rows [start, stop), without a copy."""
        ids = self.ids[:, start:stop]
        return self._map(stop - start, ids, lambda array: array[start:stop], lambda bag: bag.slice(start, stop))

    def take(self, order: NDArray[np.int64]) -> Rows:
        """The rows of these numbers, in this order."""
        ids = self.ids.take(order, axis=1)
        return self._map(len(order), ids, lambda array: array.take(order, axis=0), lambda bag: bag.take(order))

    def _map(
        self,
        num_rows: int,
        ids: NDArray[np.int64],
        array: Callable[[NDArray[Any]], NDArray[Any]],
        bag: Callable[[Jagged], Jagged],
    ) -> Rows:
        return Rows(
            num_rows,
            {name: array(values) for name, values in self.arrays.items()},
            ids,
            {name: bag(values) for name, values in self.bags.items()},
            {name: array(values) for name, values in self.extra.items()},
            {name: bag(values) for name, values in self.extra_bags.items()},
        )

    @staticmethod
    def concatenate(parts: Sequence[Rows]) -> Rows:
        """The rows of several, one after another."""
        first = parts[0]
        if len(parts) == 1:
            return first
        return Rows(
            sum(map(len, parts)),
            {name: np.concatenate([part.arrays[name] for part in parts]) for name in first.arrays},
            np.concatenate([part.ids for part in parts], axis=1),
            {name: Jagged.concatenate([part.bags[name] for part in parts]) for name in first.bags},
            {name: np.concatenate([part.extra[name] for part in parts]) for name in first.extra},
            {name: Jagged.concatenate([part.extra_bags[name] for part in parts]) for name in first.extra_bags},
        )
