"""A queue whose reader may wait for microseconds."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class PromptQueue(Generic[T]):
    """A FIFO from any threads to one that gets.

    `queue.SimpleQueue` is no replacement: its `get` takes a deadline that passes while it looks at the queue
    for none, and then waits until the next item (CPython 3.11: one of a few hundred waits of 2 us beside two
    busy threads; longer ones need a thread that is held up for longer).
    """

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._bell = threading.Lock()  # locked: no item came since somebody last waited for one
        self._bell.acquire()

    def put(self, item: T) -> None:
        self._items.append(item)
        with contextlib.suppress(RuntimeError):  # it was rung before
            self._bell.release()

    def get(self, wait_s: float = 0.0) -> T | None:
        """The oldest item; None when there is none, or none comes within `wait_s` seconds."""
        if not self._items and wait_s > 0:
            self._await(time.monotonic() + wait_s)
        return self._items.popleft() if self._items else None

    def _await(self, deadline: float) -> None:
        """Until an item is there. The bell may still ring for one that was got before."""
        while not self._items and (left_s := deadline - time.monotonic()) > 0:
            self._bell.acquire(timeout=left_s)
