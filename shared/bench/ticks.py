"""The progress of several processes as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from phloem.shared.bench.protocol import Tick

EMPTY_TICK = Tick(sent=0, succeeded=0, failed=0, in_flight=0, tokens=0, lag_ms=0.0)


class TickSum:
    """Keeps the last tick of each part and passes on their sum; of lags the worst."""

    def __init__(self, num_parts: int, on_sum: Callable[[Tick], None]) -> None:
        self._ticks = [EMPTY_TICK] * num_parts
        self._on_sum = on_sum

    def take(self, part: int, tick: Tick) -> None:
        self._ticks[part] = tick
        self._on_sum(_sum(self._ticks))


def _sum(ticks: Sequence[Tick]) -> Tick:
    return Tick(
        sent=sum(tick.sent for tick in ticks),
        succeeded=sum(tick.succeeded for tick in ticks),
        failed=sum(tick.failed for tick in ticks),
        in_flight=sum(tick.in_flight for tick in ticks),
        tokens=sum(tick.tokens for tick in ticks),
        lag_ms=max(tick.lag_ms for tick in ticks),
    )
