"""Which rows of a log make up each global batch: pure arithmetic, the same on every rank and for every number of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Schedule:
    """How `num_rows` rows, cut into `shards` contiguous ranges, are taken in global batches of `batch_size` rows.

    Batch g takes floor((k + 1) B / S) - floor(k B / S) rows of shard s with k = s + g (mod S): the rotation evens out
    what rounding gives some shards more of. The last batch takes the rows that are left over, spread in the same way,
    and a shard is as long as what is taken from it: equal up to rounding, and every other batch is full.
    Rank r of `world_size` has the shards r, r + world_size, …
    """

    num_rows: int
    batch_size: int
    shards: int
    world_size: int = 1

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        return -(-self.num_rows // self.batch_size)

    def taken(self, step: int) -> tuple[int, ...]:
        """Rows taken from each shard when `step` batches are done."""
        full = min(step, self._full_steps)
        last = self.num_rows - full * self.batch_size if step > full else 0
        return tuple(
            _share(shard, full, self.batch_size, self.shards) + _share(shard, 1, last, self.shards)
            for shard in range(self.shards)
        )

    def quota(self, step: int) -> tuple[int, ...]:
        """Rows that batch `step` takes from each shard."""
        return tuple(after - before for before, after in zip(self.taken(step), self.taken(step + 1), strict=True))

    def shard(self, shard: int) -> tuple[int, int]:
        """The rows [start, stop) of the log that are this shard."""
        return self._starts[shard], self._starts[shard + 1]

    @property
    def largest(self) -> int:
        """Rows of the largest batch on every rank with its padding."""
        return self.padded_rows(0)

    def padded_rows(self, step: int) -> int:
        """Rows of batch `step` on every rank with its padding: one size for all full batches."""
        return self._full_rows if step < self._full_steps else self._most_rows(step)

    def _most_rows(self, step: int) -> int:
        quota = self.quota(step)
        return max(sum(quota[rank :: self.world_size]) for rank in range(self.world_size))

    @property
    def _full_steps(self) -> int:
        return self.num_rows // self.batch_size

    @cached_property
    def _full_rows(self) -> int:
        return max(
            map(self._most_rows, range(min(self.shards, self._full_steps)))
        )  # quotas repeat after `shards` steps

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        starts = [0]
        for rows in self.taken(self.steps):
            starts.append(starts[-1] + rows)
        return tuple(starts)


def _share(shard: int, steps: int, batch_size: int, shards: int) -> int:
    """Rows that `steps` batches from batch 0 on take of a shard; the sum of their quotas telescopes to this."""
    return (shard + steps) * batch_size // shards - shard * batch_size // shards
