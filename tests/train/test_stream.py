"""The stream of all epochs: order, positions and the numbers that augmenting sees, however far ahead batches are fetched."""

from __future__ import annotations

import pytest

from raysys.data.reader import Position
from raysys.train.stream import BatchStream
from raysys.train.timing import StepTimer

STEPS = 3
START = Position()


class Counting:
    """A reader of batches that are their epoch and step; `read` counts what was asked of it."""

    read = 0

    def epoch(self, position=START):
        for step in range(position.step, STEPS):
            self.read += 1
            yield f"{position.epoch}.{step}", Position(position.epoch, step + 1)


def stream_of(reader, start=START):
    return BatchStream(reader, start, epochs=2, timer=StepTimer(), augment=lambda batch, n: f"{batch}#{n}")


@pytest.mark.parametrize("ahead", [False, True])
def test_every_batch_comes_once_in_order_with_its_position(ahead):
    stream, given, positions = stream_of(Counting(), Position(0, 1)), [], []
    for batch in stream:
        if ahead:
            stream.fetch_ahead()
        given.append(batch)
        trained, position = stream.trained()
        assert trained == batch
        positions.append((position.epoch, position.step))
    assert given == ["0.1#0", "0.2#1", "1.0#2", "1.1#3", "1.2#4"]
    assert positions == [(0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]


def test_one_batch_is_fetched_ahead_however_often_it_is_asked_for():
    reader = Counting()
    stream = stream_of(reader)
    for _ in range(3):
        stream.fetch_ahead()
    assert reader.read == 1
    assert next(stream) == "0.0#0"
    assert reader.read == 1
