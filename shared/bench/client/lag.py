"""The client's own lateness, measured while it measures the server."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import time
from array import array

from phloem.shared.bench.protocol import LagSamples

_PERIOD_S = 0.01
_NICE = -20
# A day of 10 ms ticks is far more than any run; the bound keeps a forgotten run from growing without end.
_MAX_SAMPLES = 8_640_000


class LagMeter:
    """Collects how late timers fire, how long bursts of reads take, and how late requests are sent.

    A timer is late while the process computes, or while the machine runs something else: any chunk that
    arrives then is stamped as late as the timer is.
    """

    def __init__(self) -> None:
        self._loop = array("d")
        self._spans = array("d")
        self._dispatch = array("d")
        self._worst_since_taken = 0.0
        self._started_s = 0.0
        self._started_cpu_s = 0.0

    async def tick_forever(self) -> None:
        """Samples the loop every 10 ms until cancelled."""
        due = time.monotonic() + _PERIOD_S
        while True:
            await asyncio.sleep(due - time.monotonic())
            now = time.monotonic()
            self._add(self._loop, max(0.0, now - due))
            due = max(due, now) + _PERIOD_S

    def note_span(self, seconds: float) -> None:
        """Reads that came together were all parsed after `seconds`."""
        self._add(self._spans, seconds)

    def note_dispatch(self, seconds: float) -> None:
        """A request was sent `seconds` after its time."""
        self._add(self._dispatch, max(0.0, seconds))

    def take_worst(self) -> float:
        """The worst sample since the last call, in seconds."""
        worst, self._worst_since_taken = self._worst_since_taken, 0.0
        return worst

    def start(self) -> None:
        """Forgets all samples: a block begins."""
        self._loop, self._spans, self._dispatch = array("d"), array("d"), array("d")
        self._started_s, self._started_cpu_s = time.monotonic(), time.process_time()

    def samples(self) -> LagSamples:
        """What was seen since `start`."""
        return LagSamples(
            loop=self._loop.tobytes(),
            spans=self._spans.tobytes(),
            dispatch=self._dispatch.tobytes(),
            cpu_s=time.process_time() - self._started_cpu_s,
            wall_s=time.monotonic() - self._started_s,
            priority=priority(),
        )

    def _add(self, samples: array[float], seconds: float) -> None:
        if len(samples) < _MAX_SAMPLES:
            samples.append(seconds)
        self._worst_since_taken = max(self._worst_since_taken, seconds)


def ask_for_priority() -> None:
    """Asks to be run as soon as there is something to stamp, where the user may (root, or CAP_SYS_NICE): real
    time, else niceness. On a machine that the server shares, a client that queues for a core stamps the
    queue. What it takes is the few microseconds of a stamp."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except OSError:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, _NICE)


def priority() -> str:
    """How this process is scheduled."""
    if os.sched_getscheduler(0) == os.SCHED_RR:
        return "real time"
    return f"nice {os.getpriority(os.PRIO_PROCESS, 0)}"


def forbid_gc_pauses() -> None:
    """Turns the cyclic collector off: its pauses would be stamped as the server's. What a run allocates is
    freed by reference counts."""
    gc.collect()
    gc.freeze()
    gc.disable()
