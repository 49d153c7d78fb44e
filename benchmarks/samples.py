"""What rounds of a benchmark measured, by name."""

from __future__ import annotations

import statistics


class Samples:
    """Values by name, in the order in which the names came first."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def add(self, name: str, value: float) -> None:
        self._values.setdefault(name, []).append(value)

    def median(self, name: str) -> float:
        """Raises `KeyError` for a name without a value."""
        return statistics.median(self._values[name])

    def lines(self) -> list[str]:
        """A table of plain text: median and range of each name."""
        width = max((len(name) for name in self._values), default=0)
        return [
            f"{name:<{width}}  {self.median(name):>12,.2f}   ({min(values):,.2f} .. {max(values):,.2f})"
            for name, values in self._values.items()
        ]
