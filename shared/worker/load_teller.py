"""Tells gateways this worker's load as it changes: heartbeats are a second apart, and several gateways that
each go by an old one all choose the same worker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeAlias

from phloem.shared.protocol.cluster import WorkerLoad

INTERVAL_S = 0.005

_Relevant: TypeAlias = tuple[int, int, tuple[str, ...]]


class LoadTeller:
    """Calls `tell` at once when what routing goes by has changed, then at most every `interval_s` with the
    latest. Use on the event loop."""

    def __init__(self, tell: Callable[[WorkerLoad], None], *, interval_s: float = INTERVAL_S) -> None:
        self._tell = tell
        self._interval_s = interval_s
        self._told: _Relevant | None = None
        self._latest = WorkerLoad()
        self._pause: asyncio.TimerHandle | None = None

    def note(self, load: WorkerLoad) -> None:
        """The load now."""
        self._latest = load
        if self._pause is None:
            self._tell_if_changed()

    def _tell_if_changed(self) -> None:
        self._pause = None
        relevant = _relevant(self._latest)
        if relevant == self._told:
            return
        self._told = relevant
        self._tell(self._latest)
        self._pause = asyncio.get_running_loop().call_later(self._interval_s, self._tell_if_changed)


def _relevant(load: WorkerLoad) -> _Relevant:
    """Free pages and rates change with every step, and only a little."""
    return load.num_running + load.num_waiting + load.num_handing_over, load.queued_tokens, load.cut_off
