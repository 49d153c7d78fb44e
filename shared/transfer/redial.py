"""When a peer is dialed again, and since when it counts as cut off. Pure.

lost a channel, can't connect    0.1 s, 0.2 s, ... 2 s; cut off when it has gone on for 3 s
refused for now                  1 s, 2 s, 4 s, ... 30 s; cut off at once: it will be some time
"""

from __future__ import annotations

from phloem.shared.errors import ErrorInfo

FIRST_PAUSE_S = 0.05
MAX_PAUSE_S = 2.0
FIRST_REFUSED_PAUSE_S = 1.0
MAX_REFUSED_PAUSE_S = 30.0
CUT_OFF_AFTER_S = 3.0
REFUSED_FOR_NOW = frozenset({"overloaded", "staging_full"})


class Redial:
    """Of one dialer. `cut_off` says why there is no channel to the peer and won't be one soon; None: there is
    one, or one may open at any time."""

    def __init__(self) -> None:
        self.cut_off: ErrorInfo | None = None
        self._pause_s = FIRST_PAUSE_S
        self._failing_since_s: float | None = None

    def opened(self) -> None:
        self.cut_off = None
        self._failing_since_s = None

    def failed(self, error: ErrorInfo, began_s: float, now_s: float) -> float:
        """An attempt that began at `began_s` has ended, before the channel opened or after it was lost.
        Returns how long to wait before the next."""
        if error.code in REFUSED_FOR_NOW:
            self.cut_off = error
            self._pause_s = min(max(2 * self._pause_s, FIRST_REFUSED_PAUSE_S), MAX_REFUSED_PAUSE_S)
            return self._pause_s
        lived_long = self._failing_since_s is None and now_s - began_s > MAX_PAUSE_S
        self._pause_s = FIRST_PAUSE_S if lived_long else min(2 * self._pause_s, MAX_PAUSE_S)
        if self._failing_since_s is None:
            self._failing_since_s = now_s if lived_long else began_s
        if now_s - self._failing_since_s >= CUT_OFF_AFTER_S:
            self.cut_off = error
        return self._pause_s

    def refused(self, error: ErrorInfo) -> None:
        """For good: nobody dials again."""
        self.cut_off = error
