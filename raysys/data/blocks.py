"""The encoded rows of a log, shard by shard and block by block, shuffled within blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raysys.data.collate import Part
from raysys.data.hashing import mix
from raysys.data.log import ParquetLog
from raysys.data.rows import Rows
from raysys.data.transforms import Transforms

KEEP_BYTES = 2**29
"""A log of at most this size, at 8 bytes a value, is encoded once and kept in memory; a larger one is streamed."""
_FILE_ORDER_ROWS = 16384  # rows encoded at a time where none are shuffled


class EncodedLog:
    """The rows of a log after the transforms, encoded when they are asked for; those of a small log only once."""

    def __init__(self, log: ParquetLog, transforms: Transforms, labels: bool) -> None:
        self._log = log
        self._transforms = transforms
        self._labels = labels
        self._columns = log.columns
        at_least = 8 * log.num_rows * len(self._columns)  # counting the values of a large log takes long
        self._keep = at_least <= KEEP_BYTES and 8 * log.num_values(self._columns) <= KEEP_BYTES
        self._kept: dict[int, Rows] = {}  # row groups by their first row

    def rows(self, start: int, stop: int, batch_size: int) -> Iterator[Rows]:
        """Rows [start, stop) of the log in order, in pieces of at most about `batch_size` rows where they are streamed."""
        if not self._keep:
            yield from self._read(start, stop, batch_size)
            return
        for first, last in self._log.row_groups():
            begin, end = max(start, first), min(stop, last)
            if begin < end:
                if first not in self._kept:
                    self._kept[first] = Rows.concatenate(list(self._read(first, last, last - first)))
                yield self._kept[first].slice(begin - first, end - first)

    def _read(self, start: int, stop: int, batch_size: int) -> Iterator[Rows]:
        for source, batch in self._log.scan(start, stop, self._columns, batch_size):
            yield self._transforms.encode(batch, source, self._labels)


@dataclass(frozen=True)
class Shuffle:
    """The order of a log's rows in an epoch: each of `shards` ranges is permuted in blocks of `block_rows` rows (0: not)."""

    seed: int
    epoch: int
    block_rows: int
    shards: int

    def blocks(self, num_rows: int, shard: int) -> Iterator[tuple[int, int]]:
        """The blocks [begin, end) of a shard; first blocks differ in length, so that shards do not all load at once."""
        size = self.block_rows or _FILE_ORDER_ROWS
        begin, end = 0, num_rows if num_rows <= size else max(1, size * (shard + 1) // self.shards)
        while begin < num_rows:
            yield begin, end
            begin, end = end, min(num_rows, end + size)

    def permute(self, rows: Rows, shard: int, block: int) -> Rows:
        """The rows of a block in the order of this epoch."""
        return rows.take(self.order(len(rows), shard, block)) if self.block_rows else rows

    def order(self, size: int, shard: int, block: int) -> NDArray[np.int64]:
        """The permutation of a block of `size`."""
        return permutation(size, (self.seed, self.epoch, shard, block))


class Shard:
    """Rows [start, stop) of a log in their order for one epoch, without the first `cursor` of that order."""

    def __init__(self, log: EncodedLog, start: int, stop: int, number: int, shuffle: Shuffle, cursor: int) -> None:
        blocks = list(shuffle.blocks(stop - start, number))
        self._blocks = _load(log, start, blocks, number, shuffle, cursor)
        self._block: Rows | None = None
        self._next = 0  # next row of the block

    def take(self, num_rows: int) -> list[Part]:
        """The next rows, from one block or several."""
        parts: list[Part] = []
        while num_rows:
            if self._block is None or self._next == len(self._block):
                self._block, self._next = next(self._blocks)
            stop = min(self._next + num_rows, len(self._block))
            parts.append((self._block, self._next, stop))
            num_rows -= stop - self._next
            self._next = stop
        return parts


def _load(
    log: EncodedLog, start: int, blocks: list[tuple[int, int]], number: int, shuffle: Shuffle, cursor: int
) -> Iterator[tuple[Rows, int]]:
    """The blocks from the one with row `cursor` on, each with the first of its rows that is not taken yet."""
    left = [(block, begin, end) for block, (begin, end) in enumerate(blocks) if end > cursor]
    if not left:
        return
    first, last = left[0][1], left[-1][2]
    pieces = log.rows(start + first, start + last, shuffle.block_rows or _FILE_ORDER_ROWS)
    rest: Rows | None = None  # of the last piece
    for block, begin, end in left:
        parts, missing = [], end - begin
        while missing:
            piece = next(pieces) if rest is None else rest
            rest = piece.slice(missing, len(piece)) if len(piece) > missing else None
            parts.append(piece.slice(0, missing) if len(piece) > missing else piece)
            missing -= len(parts[-1])
        yield shuffle.permute(Rows.concatenate(parts), number, block), max(cursor - begin, 0)


def permutation(size: int, key: tuple[int, ...]) -> NDArray[np.int64]:
    """A permutation that depends on the key alone, also on other machines and with other versions of numpy."""
    seed = np.zeros(1, np.uint64)
    for part in key:
        seed = mix(seed ^ np.uint64(part % 2**64))
    numbers = np.arange(size, dtype=np.uint64)  # in the low half of each sorting key, so that no two are equal
    low = np.uint64(0xFFFFFFFF)
    return (np.sort(mix(numbers ^ seed) & ~low | numbers) & low).astype(np.int64)
