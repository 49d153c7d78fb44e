"""A queue whose reader may wait for microseconds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from phloem.shared.engine.prompt_queue import PromptQueue


def test_items_come_in_their_order() -> None:
    queue = PromptQueue[int]()
    assert queue.get() is None
    for item in range(3):
        queue.put(item)
    assert [queue.get(), queue.get(0.0), queue.get(60.0), queue.get()] == [0, 1, 2, None]


def test_nothing_comes_within_the_time() -> None:
    queue = PromptQueue[int]()
    queue.put(1)
    assert queue.get() == 1
    began_s = time.monotonic()
    assert queue.get(0.02) is None, "word of an item that was got before is no item"
    assert time.monotonic() - began_s >= 0.02


def test_reader_wakes_up_for_an_item() -> None:
    queue = PromptQueue[int]()
    got: list[int | None] = []
    reader = threading.Thread(target=lambda: got.extend(queue.get(60.0) for _ in range(100)))
    reader.start()
    for item in range(100):
        queue.put(item)
    reader.join(30.0)
    assert got == list(range(100))


def test_items_of_several_threads_are_all_got() -> None:
    queue = PromptQueue[int]()

    def write() -> None:
        for item in range(500):
            queue.put(item)

    writers = [threading.Thread(target=write) for _ in range(4)]
    for writer in writers:
        writer.start()
    got = [queue.get(30.0) for _ in range(4 * 500)]
    for writer in writers:
        writer.join()
    assert sorted(item for item in got if item is not None) == sorted([*range(500)] * 4)
    assert queue.get() is None


def test_waits_of_microseconds_end_beside_busy_threads() -> None:
    """With `queue.SimpleQueue` one of a few hundred does not."""
    queue = PromptQueue[int]()
    num_waits = 0

    def wait_often() -> None:
        nonlocal num_waits
        for _ in range(1000):
            queue.put(1)
            assert queue.get() == 1
            assert queue.get(0.000_002) is None
            num_waits += 1

    with _busy_threads(2):
        reader = threading.Thread(target=wait_often, daemon=True)
        reader.start()
        reader.join(30.0)
    assert num_waits == 1000


@contextmanager
def _busy_threads(count: int) -> Iterator[None]:
    over, interval_s = threading.Event(), sys.getswitchinterval()

    def compute() -> None:
        while not over.is_set():
            sum(range(100))

    threads = [threading.Thread(target=compute) for _ in range(count)]
    sys.setswitchinterval(0.000_1)
    try:
        for thread in threads:
            thread.start()
        yield
    finally:
        sys.setswitchinterval(interval_s)
        over.set()
        for thread in threads:
            thread.join()
