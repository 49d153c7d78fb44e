"""When a peer is dialed again, and since when it counts as cut off. Pure.

lost a channel, can't connect    0.1 s, 0.2 s, ... 2 s; cut off when it has gone on for 3 s
refused for now, other secret    1 s, 2 s, 4 s, ... 30 s; cut off at once: it will be some time
"""

from __future__ import annotations

from phloem.shared.errors import ErrorInfo

FIRST_PAUSE_S = 0.05
MAX_PAUSE_S = 2.0
FIRST_REFUSED_PAUSE_S = 1.0
MAX_REFUSED_PAUSE_S = 30.0
CUT_OFF_AFTER_S = 3.0
REFUSED_FOR_NOW = frozenset({"overloaded", "staging_full"})
_LASTING = REFUSED_FOR_NOW | {"unauthenticated"}  # whoever mends that starts a worker again


class Redial:
    """Of one dialer."""

    def __init__(self) -> None:
        self._error: ErrorInfo | None = None  # why there is no channel; None: nothing has gone wrong
        self._is_refused = False
        self._pause_s = FIRST_PAUSE_S
        self._opened_s: float | None = None  # None: it is not open
        self._failing_since_s = 0.0

    def cut_off(self, now_s: float) -> ErrorInfo | None:
        """Why there is no channel to the peer and won't be one soon; None: there is one, or one may open at
        any time, as while the first one opens, however long that takes."""
        is_failing = self._error is not None and now_s - self._failing_since_s >= CUT_OFF_AFTER_S
        return self._error if self._is_refused or is_failing else None

    def opened(self, now_s: float) -> None:
        self._error, self._is_refused, self._opened_s = None, False, now_s

    def lost(self, error: ErrorInfo, now_s: float) -> None:
        """The channel that was open. Its attempt may go on for a while: NCCL has to let go of it."""
        if self._opened_s is not None and now_s - self._opened_s > MAX_PAUSE_S:
            self._pause_s = FIRST_PAUSE_S / 2
        self._failing_since_s, self._opened_s = now_s, None
        self._error = error  # last: others may ask meanwhile

    def failed(self, error: ErrorInfo, began_s: float) -> float:
        """An attempt that began at `began_s` is over, before the channel opened or after it was lost. Returns
        how long to wait before the next."""
        if self._error is None:
            self._failing_since_s = began_s
        self._error = error
        self._is_refused = self._is_refused or error.code in _LASTING
        if error.code in _LASTING:
            self._pause_s = min(max(2 * self._pause_s, FIRST_REFUSED_PAUSE_S), MAX_REFUSED_PAUSE_S)
        else:
            self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
        return self._pause_s

    def refused(self, error: ErrorInfo) -> None:
        """For good: nobody dials again."""
        self._error, self._is_refused = error, True
