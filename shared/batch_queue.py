"""A bounded queue whose consumer takes everything that waits at once."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class BatchQueue(Generic[T]):
    """Many producers, one consumer, first in first out.

    `max_items` bounds what `put` and `offer` let in. `force` is for messages that must not be lost and are
    bounded by other means (one per session, say). After `close` nothing gets in and `take_all` returns what
    is left, then an empty list.
    """

    def __init__(self, max_items: int) -> None:
        self._max_items = max_items
        self._items: deque[T] = deque()
        self._filled = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._items)

    def offer(self, item: T) -> bool:
        """Puts `item` in; False when the queue is full or closed."""
        if self._closed or len(self._items) >= self._max_items:
            return False
        self.force(item)
        return True

    async def put(self, item: T) -> bool:
        """Waits for room, then puts `item` in; False when the queue is or gets closed."""
        while not self._closed and len(self._items) >= self._max_items:
            await self._room.wait()
        return self.offer(item)

    def force(self, item: T) -> None:
        """Puts `item` in even when the queue is full; does nothing when it is closed."""
        if self._closed:
            return
        self._items.append(item)
        self._filled.set()
        if len(self._items) >= self._max_items:
            self._room.clear()

    def force_all(self, items: Iterable[T]) -> None:
        for item in items:
            self.force(item)

    async def take_all(self) -> list[T]:
        """Waits for at least one item; returns all. Empty: closed, and nothing is left."""
        while not self._items and not self._closed:
            await self._filled.wait()
        return self.take_now()

    def take_now(self) -> list[T]:
        """All that waits now, possibly nothing."""
        items = list(self._items)
        self._items.clear()
        self._filled.clear()
        self._room.set()
        return items

    def close(self) -> None:
        """Wakes everyone; what is queued can still be taken."""
        self._closed = True
        self._filled.set()
        self._room.set()
