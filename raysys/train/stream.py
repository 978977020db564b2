"""All epochs of a reader as one iterator that knows which batch was trained last."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice

from raysys.data.batch import Batch
from raysys.data.reader import Position, Reader
from raysys.train.timing import StepTimer


class BatchStream(Iterator[Batch]):
    """Batches from a position on. Pipelines take batches ahead; `trained` says where the finished ones ended.

    augment: what becomes of the n-th batch, n from 0, before anything is looked up; None leaves batches as they are.
    """

    def __init__(
        self,
        reader: Reader,
        start: Position,
        epochs: int,
        timer: StepTimer,
        augment: Callable[[Batch, int], Batch] | None = None,
    ) -> None:
        self._source = enumerate(_read(reader, start, epochs))
        self._augment = augment
        self._taken: deque[tuple[Batch, Position]] = deque()
        self._ahead: deque[tuple[int, tuple[Batch, Position]]] = deque()
        self._timer = timer

    def fetch_ahead(self) -> None:
        """Have the next batch ready, so that the reader's thread makes another one now.

        Called before the backward pass, which runs outside of Python: elsewhere in a step, thread and step would wait for each
        other's turn in the interpreter.
        """
        if not self._ahead:
            self._ahead.extend(islice(self._source, 1))

    def __next__(self) -> Batch:
        self._timer.mark("other")
        n, (batch, position) = self._ahead.popleft() if self._ahead else next(self._source)
        if self._augment is not None:
            batch = self._augment(batch, n)
        self._taken.append((batch, position))
        self._timer.mark("read")
        return batch

    def trained(self) -> tuple[Batch, Position]:
        """The oldest batch taken, which the pipeline has just finished, and the position after it."""
        return self._taken.popleft()


def _read(reader: Reader, start: Position, epochs: int) -> Iterator[tuple[Batch, Position]]:
    yield from reader.epoch(start)
    for epoch in range(start.epoch + 1, epochs):
        yield from reader.epoch(Position(epoch=epoch))
