"""The kernel is asked to wake threads on time."""

from __future__ import annotations

import ctypes
import threading

from phloem.shared.engine.timer_slack import ask_for_punctual_timers

_PR_GET_TIMERSLACK = 30


def _slack_ns() -> int:
    slack_ns: int = ctypes.CDLL(None).prctl(_PR_GET_TIMERSLACK, 0, 0, 0, 0)
    return slack_ns


def test_thread_and_those_that_it_starts_are_woken_within_a_microsecond() -> None:
    seen: list[int] = []

    def body() -> None:
        ask_for_punctual_timers()
        seen.append(_slack_ns())
        child = threading.Thread(target=lambda: seen.append(_slack_ns()))
        child.start()
        child.join()

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [1000, 1000]
