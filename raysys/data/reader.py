"""Batches of a log for one rank, in an order that does not depend on how many ranks there are."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from raysys.data.batch import Batch
from raysys.data.blocks import EncodedLog, Shard, Shuffle
from raysys.data.groups import Groups, GroupSchedule, GroupShuffle, read_groups
from raysys.data.log import ParquetLog
from raysys.data.prefetch import prefetch
from raysys.data.schedule import Schedule
from raysys.data.transforms import Transforms
from raysys.errors import UserError


@dataclass(frozen=True)
class Position:
    """How far reading has come: `step` batches of `epoch` are done, which took `cursors` rows from each shard."""

    epoch: int = 0
    step: int = 0
    cursors: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Position:
        """What `to_dict` gave."""
        return cls(content["epoch"], content["step"], tuple(content["cursors"]))


class Reader:
    """The batches of one rank out of `world_size`; all ranks together read every row once an epoch.

    The log is cut into `shards` contiguous ranges, and a global batch of `batch_size` rows takes some of each (see
    `Schedule`). A rank owns the shards s = rank (mod world_size), so global batch g has the same rows for every number
    of ranks. Each shard is shuffled in blocks of `shuffle_rows` rows (0: file order) by (seed, epoch, shard, block).
    Ranks that have fewer rows of a batch than others get padding; see `Batch`. `prefetch` batches are made ahead in a
    thread (0: none). With `keep_groups_whole` all rows of a group are in one batch of one rank, and batches have
    `batch_size` rows on average; groups are shuffled in place of rows.
    """

    def __init__(
        self,
        log: ParquetLog,
        transforms: Transforms,
        batch_size: int,
        shards: int = 12,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle_rows: int = 16384,
        prefetch: int = 2,
        labels: bool = True,
        keep_groups_whole: bool = False,
    ) -> None:
        if world_size > shards:
            raise UserError(
                f"data.shards is {shards}, but there are {world_size} workers",
                f"each worker reads at least one shard: set data.shards to {world_size} or more",
            )
        if log.num_rows < world_size:
            raise UserError(f"{log.path}: {log.num_rows} rows for {world_size} workers", "use fewer workers")
        self.log = log
        self.transforms = transforms
        self._rows = Schedule(log.num_rows, batch_size, shards, world_size)
        self._groups = Groups(read_groups(log), batch_size, shards, world_size) if keep_groups_whole else None
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.shuffle_rows = shuffle_rows
        self.prefetch = prefetch
        self._encoded = EncodedLog(log, transforms, labels)
        first_epoch, _ = self._order(0)
        self.steps_per_epoch = first_epoch.steps
        self.local_batch_size = first_epoch.largest

    def epoch(self, position: Position = Position()) -> Iterator[tuple[Batch, Position]]:
        """The batches of `position.epoch` that are left, each with the position after it; none after the last one."""
        schedule, shuffle = self._order(position.epoch)
        cursors = position.cursors or (0,) * self._rows.shards
        if position.step > self.steps_per_epoch or cursors != schedule.taken(position.step):
            raise UserError(
                f"{self.log.path}: the saved position (step {position.step}, rows {list(position.cursors)}) is none of this log",
                "resume with the data, the keys of data, train.batch_size and seed that it was saved with",
            )
        batches = self._batches(position, schedule, shuffle)
        return prefetch(batches, self.prefetch) if self.prefetch else batches

    def _order(self, epoch: int) -> tuple[Schedule | GroupSchedule, Shuffle]:
        """How many rows each batch of an epoch takes from each shard, and in which order a shard gives them."""
        key = (self.seed, epoch, self.shuffle_rows, self._rows.shards)
        if self._groups is None:
            return self._rows, Shuffle(*key)
        shuffle = GroupShuffle(*key, self._groups)
        return GroupSchedule(shuffle), shuffle

    def _batches(
        self, position: Position, schedule: Schedule | GroupSchedule, shuffle: Shuffle
    ) -> Generator[tuple[Batch, Position], None, None]:
        cursors = schedule.taken(position.step)
        shards = {
            number: Shard(self._encoded, *schedule.shard(number), number, shuffle, cursors[number])
            for number in range(self.rank, shuffle.shards, self.world_size)
        }
        for step in range(position.step, schedule.steps):
            quota = schedule.quota(step)
            parts = [part for number, shard in shards.items() for part in shard.take(quota[number])]
            batch = self.transforms.collate(parts, schedule.padded_rows(step))
            yield batch, Position(position.epoch, step + 1, schedule.taken(step + 1))
