"""The side of `CudaDriver` that says who gives way to whom."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class GivingWay:
    """Notes the long calls that others give way to: how long each may take."""

    def __init__(self) -> None:
        self.long_calls: list[float | None] = []
        self.num_long = 0  # under way
        self.gives_way = False

    @contextmanager
    def giving_way(self, at_most_s: float | None = None) -> Iterator[None]:
        self.long_calls.append(at_most_s)
        self.num_long += 1
        self.gives_way = True
        yield
        self.num_long -= 1
        self.gives_way = self.num_long > 0
