"""Batches of whole groups, for losses within a request: what `Schedule` and `Shuffle` do with rows, done with groups."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysys.data.blocks import Shuffle
from raysys.data.columns import ranges, whole
from raysys.data.encode import group_ids
from raysys.data.log import ParquetLog
from raysys.data.rows import Rows
from raysys.data.schedule import Schedule
from raysys.errors import UserError


def read_groups(log: ParquetLog) -> NDArray[np.int64]:
    """The first row of each group of a log and, at last, its number of rows: [groups + 1]. Reads one column.

    Raises a `UserError` where the schema has no group_id or the rows of a group are not side by side.
    """
    column = log.schema.group_id
    if column is None:
        raise UserError(
            f"{log.schema.source}: no group_id, which data.keep_groups_whole needs",
            "name the column of the groups in schema.yaml, or set data.keep_groups_whole=false",
        )
    firsts, groups, last = [], [], None
    for source, batch in log.scan(columns=[column]):
        ids = group_ids(whole(batch[0]))  # [n]
        begins = np.flatnonzero(np.concatenate([[ids[0] != last], ids[1:] != ids[:-1]]))
        firsts.append(source.log_row + begins)
        groups.append(ids[begins])
        last = ids[-1]
    starts = np.concatenate([*firsts, [log.num_rows]])
    _check_adjacent(log, column, starts, np.concatenate(groups))
    return starts


def _check_adjacent(log: ParquetLog, column: str, starts: NDArray[np.int64], groups: NDArray[np.int64]) -> None:
    order = np.argsort(groups, kind="stable")
    repeated = np.flatnonzero(groups[order[1:]] == groups[order[:-1]])
    if len(repeated):
        found = repeated[np.argmin(order[repeated + 1])]  # of several the one that comes first in the log
        before, _ = _look_up(log, column, int(starts[order[found] + 1]) - 1)
        place, group = _look_up(log, column, int(starts[order[found + 1]]))
        raise UserError(
            f"{place}: group {group!r} of column {column!r} goes on, and its rows before end at {before}",
            f"data.keep_groups_whole needs the rows of a group side by side: sort the log by {column!r}",
        )


def _look_up(log: ParquetLog, column: str, row: int) -> tuple[str, Any]:
    """Where a row of the log is, and its value in a column."""
    source, batch = next(log.scan(row, row + 1, [column]))
    return source.at(0), batch[0][0].as_py()


class Groups:
    """The groups of a log, dealt out by a `Schedule` to shards and batches as rows are without them.

    A batch takes as many groups as have `batch_size` rows on average, and at least one.
    """

    def __init__(self, starts: NDArray[np.int64], batch_size: int, shards: int, world_size: int) -> None:
        count, num_rows = len(starts) - 1, int(starts[-1])
        self.schedule = Schedule(count, max(round(batch_size * count / num_rows), 1), shards, world_size)
        bounds = [self.schedule.shard(shard) for shard in range(shards)]
        self.starts = tuple(starts[first : last + 1] for first, last in bounds)
        """For each shard the first row of each of its groups and, at last, the row after its last one."""

    @cached_property
    def taken(self) -> NDArray[np.int64]:
        """The groups taken from each shard when 0, 1, … batches are done, [steps + 1, shards]."""
        return np.array([self.schedule.taken(step) for step in range(self.schedule.steps + 1)])


@dataclass(frozen=True, eq=False)
class GroupShuffle(Shuffle):
    """The order of whole groups: blocks end where groups do, and the rows of a group keep theirs."""

    groups: Groups

    def blocks(self, num_rows: int, shard: int) -> Iterator[tuple[int, int]]:
        """The blocks [begin, end) of a shard, each longer by what its last group has beyond `Shuffle`'s end."""
        starts = self.groups.starts[shard]
        return pairwise((starts[self._cuts[shard]] - starts[0]).tolist())

    def permute(self, rows: Rows, shard: int, block: int) -> Rows:
        """The rows of a block with its groups in the order of this epoch."""
        if not self.block_rows:
            return rows
        first, last = self._cuts[shard][block : block + 2]
        starts = self.groups.starts[shard][first : last + 1]
        order = self.order(last - first, shard, block)
        return rows.take(ranges((starts[:-1] - starts[0])[order], np.diff(starts)[order]))

    def rows_taken(self, shard: int) -> NDArray[np.int64]:
        """The rows of a shard's first 0, 1, … groups in the order of this epoch, [groups + 1]."""
        sizes = np.diff(self.groups.starts[shard], prepend=self.groups.starts[shard][0])  # and 0 for no group
        for block, (first, last) in enumerate(pairwise(self._cuts[shard]) if self.block_rows else ()):
            sizes[first + 1 : last + 1] = sizes[first + 1 : last + 1][self.order(last - first, shard, block)]
        return np.cumsum(sizes)

    @cached_property
    def _cuts(self) -> list[list[int]]:
        """For each shard the groups that its blocks begin with and, at last, the number of its groups."""
        return [self._cut(shard, starts) for shard, starts in enumerate(self.groups.starts)]

    def _cut(self, shard: int, starts: NDArray[np.int64]) -> list[int]:
        ends = [end for _, end in super().blocks(int(starts[-1] - starts[0]), shard)]
        cuts: list[int] = np.unique(np.searchsorted(starts, starts[0] + np.array([0, *ends]))).tolist()
        return cuts


class GroupSchedule:
    """`Schedule` for an epoch of whole groups: its figures are rows, known to every rank from the sizes of all groups."""

    def __init__(self, shuffle: GroupShuffle) -> None:
        groups, ranks = shuffle.groups, shuffle.groups.schedule.world_size
        shards = range(groups.schedule.shards)
        self._taken = np.stack([shuffle.rows_taken(shard)[groups.taken[:, shard]] for shard in shards], axis=1)
        self._bounds = [(int(starts[0]), int(starts[-1])) for starts in groups.starts]
        quota = np.diff(self._taken, axis=0)  # [steps, shards]
        self._padded = np.max([quota[:, rank::ranks].sum(axis=1) for rank in range(ranks)], axis=0)  # [steps]
        self.steps = groups.schedule.steps
        self.largest = int(self._padded.max())

    def taken(self, step: int) -> tuple[int, ...]:
        """Rows taken from each shard when `step` batches are done."""
        return tuple(self._taken[step].tolist())

    def quota(self, step: int) -> tuple[int, ...]:
        """Rows that batch `step` takes from each shard."""
        return tuple((self._taken[step + 1] - self._taken[step]).tolist())

    def shard(self, shard: int) -> tuple[int, int]:
        """The rows [start, stop) of the log that are this shard."""
        return self._bounds[shard]

    def padded_rows(self, step: int) -> int:
        """Rows of batch `step` on every rank with its padding: those of the rank that has most."""
        return int(self._padded[step])
