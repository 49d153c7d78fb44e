"""When sessions arrive in an open loop: pure functions of a rate and a seed."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Literal, TypeAlias

import msgspec

from phloem.shared.errors import ConfigError

Arrival: TypeAlias = Literal["poisson", "constant", "burst"]


class Rate(msgspec.Struct, frozen=True):
    """Sessions per second: `first` at the start, growing linearly to `last` over `ramp_s`, then `last`.

    Infinite: all at once.
    """

    first: float
    last: float
    ramp_s: float = 0.0

    def time_of(self, count: float) -> float:
        """Seconds until `count` arrivals are due: the inverse of the rate's integral."""
        if math.isinf(self.last):
            return 0.0
        in_ramp = (self.first + self.last) / 2 * self.ramp_s
        if count >= in_ramp:
            return self.ramp_s + (count - in_ramp) / self.last
        growth = (self.last - self.first) / self.ramp_s
        if growth == 0:
            return count / self.first
        return (math.sqrt(self.first**2 + 2 * growth * count) - self.first) / growth


def parse_ramp(text: str, what: str) -> tuple[float, float]:
    """From "8" or "1:8" (first:last). Raises `ConfigError` unless both are positive."""
    first, _, last = text.partition(":")
    try:
        ends = float(first), float(last or first)
    except ValueError:
        ends = (0.0, 0.0)
    if not min(ends) > 0:
        raise ConfigError(f"{what} {text!r}: write a positive number, or FIRST:LAST for a ramp")
    return ends


def arrival_times(rate: Rate, arrival: Arrival, *, burst_size: int = 1, seed: int = 0) -> Iterator[float]:
    """Seconds after the start at which sessions arrive, ascending, without end.

    "poisson": exponential gaps; "constant": equal gaps; "burst": `burst_size` at once, at Poisson moments,
    so that the mean rate stays. The first arrival is at 0, as in SGLang's bench_serving.
    """
    rng = random.Random(seed)
    count = 0.0
    size = burst_size if arrival == "burst" else 1
    while True:
        due = rate.time_of(count)
        for _ in range(size):
            yield due
        count += size * (1.0 if arrival == "constant" else rng.expovariate(1.0))
