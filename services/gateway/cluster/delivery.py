"""When the consumers of requests learn that something came for them."""

from __future__ import annotations

import asyncio
import time

from phloem.services.gateway.cluster.live_request import LiveRequest

# Longest that a token is held back. What else the loop did in between is no reason for more.
MAX_PAUSE_S = 0.02
# So many messages for one request between two deliveries: an event for each can not be kept up.
_BEHIND = 3
_MAX_STRETCH = 8


class Delivery:
    """Wakes requests that have news, all at once, and leaves the event loop at least as much time in between.

        wake, consumers run, sockets are written | as long again: messages are read and merged | wake ...
        `-------------------- T ----------------'

    A loop with time to spare is rarely in that pause when a message comes. One that has none would fall
    behind, with an event per token and stream; so it takes in what has come, and sends fewer, longer events.
    While it is far behind the pause grows, up to `_MAX_STRETCH` times T.
    """

    def __init__(self, max_pause_s: float = MAX_PAUSE_S) -> None:
        self._max_pause_s = max_pause_s
        self._waiting: dict[LiveRequest, int] = {}  # how often there was news, in order of the first
        self._scheduled = False
        self._stretch = 1

    def add(self, live: LiveRequest) -> None:
        """There is news for `live`."""
        self._waiting[live] = self._waiting.get(live, 0) + 1
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._deliver)

    def _deliver(self) -> None:
        loop = asyncio.get_running_loop()
        started = time.perf_counter()
        waiting, self._waiting = self._waiting, {}
        behind = max(waiting.values()) >= _BEHIND
        self._stretch = min(2 * self._stretch, _MAX_STRETCH) if behind else 1
        for live in waiting:
            live.wake()
        # Behind the consumers that were just woken, and then behind what the loop writes for them.
        loop.call_soon(loop.call_soon, self._delivered, started)

    def _delivered(self, started: float) -> None:
        pause_s = min(self._stretch * (time.perf_counter() - started), self._max_pause_s)
        asyncio.get_running_loop().call_later(pause_s, self._resume)

    def _resume(self) -> None:
        if self._waiting:
            self._deliver()
        else:
            self._scheduled = False
