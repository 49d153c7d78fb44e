"""Means and quantiles as numpy computes them, without numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec


class Summary(msgspec.Struct, frozen=True):
    """Moments and quantiles of `count` values, in their unit. Not made of nothing: see `summarize`."""

    count: int
    mean: float
    std: float
    median: float
    p90: float
    p95: float
    p99: float
    max: float


def quantile(ordered: Sequence[float], share: float) -> float:
    """The quantile of values in ascending order, linear between neighbours (numpy's default).

    Raises `ValueError` for no values.
    """
    if not ordered:
        raise ValueError("no values")
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def summarize(values: Sequence[float]) -> Summary | None:
    """None for no values: there is nothing to say, and no zero that could be taken for a latency."""
    if not values:
        return None
    ordered = sorted(values)
    mean = math.fsum(ordered) / len(ordered)
    return Summary(
        count=len(ordered),
        mean=mean,
        std=math.sqrt(math.fsum((value - mean) ** 2 for value in ordered) / len(ordered)),
        median=quantile(ordered, 0.5),
        p90=quantile(ordered, 0.90),
        p95=quantile(ordered, 0.95),
        p99=quantile(ordered, 0.99),
        max=ordered[-1],
    )
