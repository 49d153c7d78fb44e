"""Figures beside the bound that they have to keep."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

Sense = Literal["<=", ">="]


class Bar(msgspec.Struct, frozen=True):
    """One figure. Without a `bound` it is told, not judged. A value that is no number (nothing could be
    measured) meets no bound."""

    what: str
    value: float
    unit: str = ""
    bound: float | None = None
    sense: Sense = "<="

    @property
    def met(self) -> bool:
        if self.bound is None:
            return True
        if math.isnan(self.value):
            return False
        return self.value <= self.bound if self.sense == "<=" else self.value >= self.bound

    @property
    def verdict(self) -> str:
        """ "met", "MISSED", or nothing where there is no bound."""
        if self.bound is None:
            return ""
        return "met" if self.met else "MISSED"

    @property
    def bound_text(self) -> str:
        return "" if self.bound is None else f"{self.sense} {self.bound:g}"


def bar_lines(bars: list[Bar]) -> list[str]:
    """A table of plain text, one bar a line."""
    width = max((len(bar.what) for bar in bars), default=0)
    return [
        f"{bar.what:<{width}}  {bar.value:>10.3f} {bar.unit:<5} {bar.bound_text:<10} {bar.verdict}".rstrip()
        for bar in bars
    ]
