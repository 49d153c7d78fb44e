"""A bounded FIFO between threads that can be closed."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

from phloem.shared.transfer.errors import channel_lost, transfer_timeout

T = TypeVar("T")


class Mailbox(Generic[T]):
    """`close` drops what is left and wakes everyone; from then on `put` and `get` raise `channel_lost`."""

    def __init__(self, max_items: int) -> None:
        self._items: deque[T] = deque()
        self._max_items = max_items
        self._changed = threading.Condition()
        self._closed = False
        self._getting = False

    def put(self, item: T, timeout_s: float = 0.0) -> None:
        """Raises `transfer_timeout` when there is no room within `timeout_s` (0: now)."""
        with self._changed:
            if not self._changed.wait_for(
                lambda: self._closed or len(self._items) < self._max_items, timeout_s
            ):
                raise transfer_timeout(f"{self._max_items} items wait and none moves")
            self._check_open()
            self._items.append(item)
            self._changed.notify_all()

    def get(self, timeout_s: float | None = None) -> T | None:
        """The oldest item; None when nothing came within `timeout_s`. One thread gets."""
        with self._changed:
            self._getting = True
            if not self._changed.wait_for(lambda: self._closed or self._items, timeout_s):
                self._getting = False
                return None
            self._check_open()
            item = self._items.popleft()
            self._getting = False
            self._changed.notify_all()
            return item

    @property
    def is_idle(self) -> bool:
        """Nothing waits, and the getter is done with what it got: it came back for more."""
        with self._changed:
            return self._closed or (not self._items and self._getting)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()

    def _check_open(self) -> None:
        if self._closed:
            raise channel_lost("the channel is closed")
