"""How promptly an engine's threads get to run."""

from __future__ import annotations

import ctypes
import logging
import sys

log = logging.getLogger(__name__)

_PR_SET_TIMERSLACK = 29
_SLACK_NS = 1000
_SWITCH_S = 0.000_5


def ask_for_punctual_threads() -> None:
    """For the calling thread and those that it starts.

    Linux wakes a sleeper up to 50 us late to save wake-ups, and an engine looks at its device more often than
    that. Python lets a thread wait for the interpreter for up to 5 ms while another one computes in Python; a
    channel's threads have a few microseconds' work each, which the pieces of a hand-over wait for.
    """
    sys.setswitchinterval(_SWITCH_S)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_TIMERSLACK, _SLACK_NS, 0, 0, 0) != 0:
        log.info("timers stay unpunctual: prctl says %d", ctypes.get_errno())
