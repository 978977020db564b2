"""What was known before each row: counts, means and histories over earlier rows of the same group, without any leak."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Past:
    """For each of N rows, the visible rows of its group at a strictly earlier time, oldest first.

    They are `order[start[n]:stop[n]]`. Rows at the same time are not among them, in whatever order they were written:
    nothing says which of them came first. A row that is not visible (held back) is in nobody's past.
    """

    order: Integers
    start: Integers
    stop: Integers

    @classmethod
    def of(cls, group: Integers, time: Integers, visible: NDArray[np.bool_]) -> Past:
        """The pasts of all rows. Ties within a past are in the order of the rows."""
        rows = np.flatnonzero(visible)
        order = rows[np.lexsort((time[rows], group[rows]))]
        moment = _moments(group, time)
        return cls(order, np.searchsorted(group[order], group), np.searchsorted(moment[order], moment))

    @property
    def count(self) -> Integers:
        """[N] how many rows each past has."""
        return self.stop - self.start

    def sum(self, value: Floats, last: int | None = None) -> Floats:
        """[N] or [N, K]: the sum of `value` (of every row) over each past, or over its `last` rows."""
        totals = np.concatenate([np.zeros((1, *value.shape[1:])), np.cumsum(value[self.order], axis=0)])
        return totals[self.stop] - totals[self._start(last)]

    def mean(self, value: Floats, prior: float, strength: float, last: int | None = None) -> Floats:
        """[N] the mean of each past as if it began with `strength` rows of value `prior`."""
        count = self.stop - self._start(last)
        return (self.sum(value, last) + strength * prior) / (count + strength)

    def lists(self, value: pa.Array, last: int) -> pa.ListArray:
        """[N] the values of the `last` rows of each past, oldest first."""
        start = self._start(last)
        offsets = np.concatenate([[0], np.cumsum(self.stop - start)])
        positions = np.arange(offsets[-1]) + np.repeat(start - offsets[:-1], self.stop - start)
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), value.take(pa.array(self.order[positions])))

    def _start(self, last: int | None) -> Integers:
        return self.start if last is None else np.maximum(self.start, self.stop - last)


def _moments(group: Integers, time: Integers) -> Integers:
    """[N] a number for each (group, time), in their order."""
    order = np.lexsort((time, group))
    changes = (np.diff(group[order], prepend=-1) != 0) | (np.diff(time[order], prepend=-1) != 0)
    moment = np.empty(len(group), np.int64)
    moment[order] = np.cumsum(changes)
    return moment
