"""Resampling: how much of a difference may be luck."""

from __future__ import annotations

import itertools
import math
import random
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from operator import mul

from phloem.shared.bench.statistics import quantile

_CONFIDENCE = 0.95


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
    a: ClusteredValues,
    b: ClusteredValues,
    num_clusters: tuple[int, int],
    stats: Sequence[str],
    *,
    is_paired: bool,
    num_resamples: int,
    seed: int,
) -> Mapping[str, tuple[float, float] | None]:
    """95% percentile intervals of stat(b) / stat(a). `is_paired`: cluster i of both saw the same conditions
    (the same round), so both are resampled alike. None where a resample had no values or a zero."""
    rng = random.Random(seed)
    ratios: dict[str, list[float]] = {stat: [] for stat in stats}
    for _ in range(num_resamples):
        weights_a = draw_weights(rng, num_clusters[0])
        weights_b = weights_a if is_paired else draw_weights(rng, num_clusters[1])
        for stat in stats:
            below, above = a.stat(stat, weights_a), b.stat(stat, weights_b)
            ratios[stat].append(above / below if below else math.nan)
    return {stat: interval(values) for stat, values in ratios.items()}


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The middle 95% of the values; None when one is not a number."""
    if not values or any(math.isnan(value) for value in values):
        return None
    ordered = sorted(values)
    tail = (1 - _CONFIDENCE) / 2
    return quantile(ordered, tail), quantile(ordered, 1 - tail)
