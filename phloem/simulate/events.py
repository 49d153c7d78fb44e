"""The discrete clock."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class EventQueue:
    """Calls what is due, in order of time; equal times in the order in which they were asked for."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.num_events = 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        """`action` is called at `time_s`, or now when that is past."""
        self._count += 1
        heapq.heappush(self._heap, (max(time_s, self.now_s), self._count, action))

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        self.at(self.now_s + delay_s, action)

    def run(self, is_over: Callable[[], bool]) -> None:
        """Until `is_over` or nothing is due any more."""
        heap = self._heap
        while heap and not is_over():
            self.now_s, _, action = heapq.heappop(heap)
            self.num_events += 1
            action()
