"""Figures beside the bounds that they have to keep: what every `--check` prints and judges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec

Sense = Literal["<=", ">="]


class Bar(msgspec.Struct, frozen=True):
    """One figure. Without a `bound` it is told, not judged. A `value` that is no number was not measured: it
    meets no bound."""

    what: str
    value: float
    unit: str = ""
    bound: float | None = None
    sense: Sense = "<="

    @property
    def is_measured(self) -> bool:
        return not math.isnan(self.value)

    @property
    def is_met(self) -> bool:
        if self.bound is None:
            return True
        # Both comparisons are False for a value that is no number.
        return self.value <= self.bound if self.sense == "<=" else self.value >= self.bound

    @property
    def verdict(self) -> str:
        """ "met", "MISSED", or nothing where there is no bound."""
        if self.bound is None:
            return ""
        return "met" if self.is_met else "MISSED"

    @property
    def bound_text(self) -> str:
        return "" if self.bound is None else f"{self.sense} {self.bound:g}"


def all_met(bars: Sequence[Bar]) -> bool:
    return all(bar.is_met for bar in bars)


def bar_lines(bars: Sequence[Bar]) -> list[str]:
    """A table of plain text, one bar a line."""
    width = max((len(bar.what) for bar in bars), default=0)
    return [
        f"{bar.what:<{width}}  {bar.value:>10.3f} {bar.unit:<5} {bar.bound_text:<10} {bar.verdict}".rstrip()
        for bar in bars
    ]
