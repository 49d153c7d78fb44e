"""When a child that died is started again. Pure."""

from __future__ import annotations

from typing import NamedTuple

FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 30.0
HEALTHY_AFTER_S = 60.0


class Restart(NamedTuple):
    """Wait `delay_s`, then start; `attempt` counts restarts in a row."""

    attempt: int
    delay_s: float


def next_restart(attempt: int, lived_s: float) -> Restart:
    """The restart after a death: the delay doubles from death to death, and starts over for a child that
    had lived for a minute."""
    attempt = 1 if lived_s >= HEALTHY_AFTER_S else attempt + 1
    return Restart(attempt, min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(attempt - 1, 16)))
