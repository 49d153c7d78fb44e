"""How punctual the kernel wakes an engine's threads."""

from __future__ import annotations

import ctypes
import logging

log = logging.getLogger(__name__)

_PR_SET_TIMERSLACK = 29
_SLACK_NS = 1000


def ask_for_punctual_timers() -> None:
    """For the calling thread and those that it starts: Linux wakes a sleeper up to 50 us late to save
    wake-ups, and an engine looks at its device more often than that. Without it everything works, a little
    later."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_TIMERSLACK, _SLACK_NS, 0, 0, 0) != 0:
        log.info("timers stay unpunctual: prctl says %d", ctypes.get_errno())
