"""Threads get to run soon: the kernel wakes them on time, and Python lets them in."""

from __future__ import annotations

import ctypes
import sys
import threading

from phloem.shared.engine.punctuality import ask_for_punctual_threads

_PR_GET_TIMERSLACK = 30


def _slack_ns() -> int:
    slack_ns: int = ctypes.CDLL(None).prctl(_PR_GET_TIMERSLACK, 0, 0, 0, 0)
    return slack_ns


def test_thread_and_those_that_it_starts_are_punctual() -> None:
    seen: list[int] = []

    def body() -> None:
        ask_for_punctual_threads()
        seen.append(_slack_ns())
        child = threading.Thread(target=lambda: seen.append(_slack_ns()))
        child.start()
        child.join()

    thread = threading.Thread(target=body)
    before = sys.getswitchinterval()
    try:
        thread.start()
        thread.join()
        assert seen == [1000, 1000]
        assert sys.getswitchinterval() < 0.001
    finally:
        sys.setswitchinterval(before)
