"""Resampling: how much of a difference may be luck."""

from __future__ import annotations

import itertools
import math
import random
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from operator import mul
from statistics import NormalDist
from typing import Protocol

from phloem.shared.bench.statistics import quantile

_CONFIDENCE = 0.95


class Resampled(Protocol):
    """Something whose statistics can be taken with clusters repeated."""

    def stat(self, name: str, weights: Sequence[int] | None = None) -> float: ...


class RatesOfRounds:
    """Counts and durations of rounds: "rate" is the sum of the one by the sum of the other."""

    def __init__(self, rounds: Sequence[tuple[float, float]]) -> None:
        self._counts = [count for count, _ in rounds]
        self._durations = [duration for _, duration in rounds]

    def stat(self, name: str, weights: Sequence[int] | None = None) -> float:
        weights = weights if weights is not None else [1] * len(self._counts)
        duration = sum(map(mul, weights, self._durations))
        return sum(map(mul, weights, self._counts)) / duration if duration else math.nan


class ClusteredValues:
    """Values that come in clusters (the gaps of a session, of a round), resampled cluster by cluster: values
    of one cluster are alike, and counting them as independent makes intervals too narrow."""

    def __init__(self, clusters: Sequence[Sequence[float]]) -> None:
        order = sorted((value, index) for index, values in enumerate(clusters) for value in values)
        self._values = [value for value, _ in order]
        self._owners = [index for _, index in order]
        self._sums = [math.fsum(values) for values in clusters]
        self._sizes = [len(values) for values in clusters]

    @property
    def count(self) -> int:
        return len(self._values)

    def stat(self, name: str, weights: Sequence[int] | None = None) -> float:
        """ "mean", "median", "p99" and so on, with each cluster taken `weights` times (None: once). NaN when
        all that was taken is empty."""
        if weights is None:
            weights = [1] * len(self._sums)
        if name == "mean":
            size = sum(map(mul, weights, self._sizes))
            return sum(map(mul, weights, self._sums)) / size if size else math.nan
        share = 0.5 if name == "median" else float(name[1:]) / 100
        return self._quantile(share, weights)

    def _quantile(self, share: float, weights: Sequence[int]) -> float:
        """As `statistics.quantile` of the values repeated by their weights."""
        upto = list(itertools.accumulate(map(weights.__getitem__, self._owners)))
        if not upto or not upto[-1]:
            return math.nan
        place = share * (upto[-1] - 1)
        below = math.floor(place)
        low = self._values[bisect_right(upto, below)]
        high = self._values[bisect_right(upto, min(below + 1, upto[-1] - 1))]
        return low + (high - low) * (place - below)


def draw_weights(rng: random.Random, num_clusters: int) -> list[int]:
    """How often each cluster is in one resample."""
    weights = [0] * num_clusters
    for index in rng.choices(range(num_clusters), k=num_clusters):
        weights[index] += 1
    return weights


def ratio_intervals(
    a: Resampled,
    b: Resampled,
    num_clusters: tuple[int, int],
    stats: Sequence[str],
    *,
    is_paired: bool,
    num_resamples: int,
    seed: int,
) -> Mapping[str, tuple[float, float] | None]:
    """95% intervals of stat(b) / stat(a). `is_paired`: cluster i of both saw the same conditions (the same
    round), so both are resampled alike. None where a resample had no values or a zero."""
    rng = random.Random(seed)
    ratios: dict[str, list[float]] = {stat: [] for stat in stats}
    for _ in range(num_resamples):
        weights_a = draw_weights(rng, num_clusters[0])
        weights_b = weights_a if is_paired else draw_weights(rng, num_clusters[1])
        for stat in stats:
            below, above = a.stat(stat, weights_a), b.stat(stat, weights_b)
            ratios[stat].append(above / below if below else math.nan)
    return {stat: interval(values, min(num_clusters)) for stat, values in ratios.items()}


def interval(values: Sequence[float], num_clusters: int) -> tuple[float, float] | None:
    """The middle of the resampled values, wide enough for so few clusters; None when one is not a number.

    Percentile intervals of n values are as much too narrow as a normal quantile is below Student's t; the
    levels are moved out by that (Hesterberg 2015, "What teachers should know about the bootstrap").
    """
    if not values or num_clusters < 2 or any(math.isnan(value) for value in values):
        return None
    ordered = sorted(values)
    spread = student_quantile(num_clusters - 1) * math.sqrt(num_clusters / (num_clusters - 1))
    tail = NormalDist().cdf(-spread)
    return quantile(ordered, tail), quantile(ordered, 1 - tail)


def student_quantile(degrees: int, share: float = (1 + _CONFIDENCE) / 2) -> float:
    """Student's t quantile by Cornish and Fisher's expansion: within 1% from 4 degrees of freedom on."""
    z = NormalDist().inv_cdf(share)
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )
