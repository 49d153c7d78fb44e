"""Service-level objectives: which requests were good enough."""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from phloem.shared.bench.statistics import quantile
from phloem.shared.bench.timing import RequestTiming
from phloem.shared.errors import ConfigError

_UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)")
_SHARES = {"median": 0.5, "p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "max": 1.0}
_SINGLE = ("ttft", "tpot", "e2e", "first_gap")
_MANY = ("itl", "chunk_itl")


class Objective(msgspec.Struct, frozen=True):
    """One limit that a request must keep: `metric` at most `limit_s`.

    `itl` and `chunk_itl` have many values in a request; `stat` says which of them counts: its own "p99"
    when not said, or mean, median, p90, p95, max.
    """

    metric: str
    limit_s: float
    stat: str = "p99"

    def holds(self, timing: RequestTiming) -> bool:
        """A request with too few tokens to have the metric keeps it."""
        value = self._value(timing)
        return value is None or value <= self.limit_s

    def _value(self, timing: RequestTiming) -> float | None:
        match self.metric:
            case "ttft":
                return timing.ttft_s
            case "tpot":
                return timing.tpot_s
            case "e2e":
                return timing.e2e_s
            case "first_gap":
                return timing.first_gap_s
            case "itl":
                return self._stat_of(timing.itl_s if timing.itl_s is not None else timing.chunk_itl_s)
            case _:
                return self._stat_of(timing.chunk_itl_s)

    def _stat_of(self, values: Sequence[float]) -> float | None:
        if not values:
            return None
        if self.stat == "mean":
            return sum(values) / len(values)
        return quantile(sorted(values), _SHARES[self.stat])


def parse_duration(text: str) -> float:
    """Seconds from "500ms", "30s", "2m", "1.5h"; a bare number is seconds. Raises `ConfigError`."""
    found = _DURATION.fullmatch(text.strip().lower())
    if found is None or (found[2] and found[2] not in _UNITS_S):
        raise ConfigError(f"{text!r} is no duration: write 500ms, 30s, 2m or 1h")
    return float(found[1]) * _UNITS_S[found[2] or "s"]


def parse_slo(text: str) -> tuple[Objective, ...]:
    """From "ttft:500ms,itl:30ms,itl.max:1s". Raises `ConfigError`."""
    return tuple(_parse_objective(part) for part in text.split(",") if part.strip())


def _parse_objective(part: str) -> Objective:
    name, separator, limit = part.strip().partition(":")
    metric, _, stat = name.partition(".")
    if not separator or metric not in (*_SINGLE, *_MANY):
        known = ", ".join((*_SINGLE, *_MANY))
        raise ConfigError(f"{part!r} is no objective: write METRIC:LIMIT with METRIC one of {known}")
    if stat and (metric in _SINGLE or (stat != "mean" and stat not in _SHARES)):
        raise ConfigError(f"{name!r}: a statistic (mean, {', '.join(_SHARES)}) goes with itl and chunk_itl")
    return Objective(metric, parse_duration(limit), stat or "p99")


def is_good(timing: RequestTiming, objectives: Sequence[Objective]) -> bool:
    """Whether the request kept every objective."""
    return all(objective.holds(timing) for objective in objectives)
