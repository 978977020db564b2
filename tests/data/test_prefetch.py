from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from raysys.data.prefetch import prefetch


def threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited for 10 s"
        time.sleep(0.001)


def numbers(made: list[int], closed: list[bool], stop: int = 100) -> Iterator[int]:
    try:
        for number in range(stop):
            made.append(number)
            yield number
    finally:
        closed.append(True)


def test_items_come_in_order_and_the_thread_ends():
    made: list[int] = []
    closed: list[bool] = []
    assert list(prefetch(numbers(made, closed), 3)) == list(range(100))
    assert closed == [True]
    assert threads() == 0


def test_no_more_than_the_depth_is_computed_ahead():
    made: list[int] = []
    items = prefetch(numbers(made, []), 3)
    assert made == [], "nothing starts before the first item is asked for"
    assert next(items) == 0
    wait_until(lambda: len(made) == 5)  # one taken, three in the queue, one waiting for room
    time.sleep(0.05)
    assert len(made) == 5
    items.close()


def test_an_error_arrives_after_the_items_before_it():
    def broken() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("third")

    items = prefetch(broken(), 5)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(ValueError, match="third"):
        next(items)
    assert list(items) == []
    assert threads() == 0


@pytest.mark.parametrize("taken", [1, 7])
def test_an_abandoned_iterator_leaves_no_thread(taken):
    made: list[int] = []
    closed: list[bool] = []
    items = prefetch(numbers(made, closed, stop=10**9), 2)
    for _ in range(taken):
        next(items)
    assert threads() == 1
    del items
    gc.collect()
    assert threads() == 0
    assert closed == [True]
