"""Computing the next items of an iterator in a background thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

T = TypeVar("T")


def prefetch(items: Generator[T, None, None], depth: int) -> Iterator[T]:
    """The items in order, up to `depth` of them computed ahead; an error arrives where its item would have.

    The thread starts with the first `next` and ends with the items, with an error, or when this iterator is closed or
    forgotten; `items` is closed in the thread, so that files do not stay open.
    """
    results: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()
    thread = threading.Thread(target=_produce, args=(items, results, stopped), name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            is_item, result = results.get()
            if is_item:
                yield result  # type: ignore[misc]
            elif isinstance(result, BaseException):
                raise result
            else:
                return
    finally:
        stopped.set()
        while thread.is_alive():  # the thread may be waiting for room in the queue
            _drain(results)
            thread.join(timeout=0.01)


def _produce(
    items: Generator[T, None, None],
    results: queue.Queue[tuple[bool, T | BaseException | None]],
    stopped: threading.Event,
) -> None:
    end: BaseException | None = None
    try:
        for item in items:
            results.put((True, item))
            if stopped.is_set():
                return
    except BaseException as error:
        end = error
    finally:
        items.close()
    results.put((False, end))


def _drain(results: queue.Queue[tuple[bool, T | BaseException | None]]) -> None:
    try:
        while True:
            results.get_nowait()
    except queue.Empty:
        return
