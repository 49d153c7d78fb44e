"""Time by part of a step, from outside: methods of living objects are wrapped."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any


class Stopwatch:
    """Seconds of each call, by part; what a part does inside another counts for itself only."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.calls: dict[str, list[float]] = {}
        self.clock = clock
        self._inside = [0.0]  # time of the parts within each open part

    def around(self, owner: object, method: str, part: str) -> None:
        function: Callable[..., Any] = getattr(owner, method)  # Any: whatever the method takes and gives

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.clock()
            self._inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                whole = self.clock() - start
                self.calls.setdefault(part, []).append(whole - self._inside.pop())
                self._inside[-1] += whole

        setattr(owner, method, timed)

    def total(self, part: str) -> float:
        return sum(self.calls.get(part, []))

    def median(self, part: str) -> float:
        return statistics.median(self.calls.get(part) or [0.0])
