"""The least that a Litestar endpoint can do for a stream: write events that are ready.

    python -m benchmarks.gateway.bare PORT EVENT

GET /events?count=N&interval_s=S, on the gateway's own HTTP server and event loop. With an interval all
streams write one event at each tick of one clock, as the workers' steps have it; without one nothing waits.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

from litestar import Litestar, get
from litestar.response import Stream

from benchmarks.gateway.workers import until_tick
from phloem.services.gateway.http_server import bind, serve_http
from phloem.shared.lifecycle.service import run_service, stop_event


class Clock:
    """Wakes all who wait at the same moments."""

    def __init__(self) -> None:
        self._tick: asyncio.Future[None] | None = None

    async def tick(self, interval_s: float) -> None:
        loop = asyncio.get_running_loop()
        if self._tick is None or self._tick.done():
            self._tick = loop.create_future()
            loop.call_later(until_tick(loop.time(), interval_s), self._tick.set_result, None)
        await self._tick


def create_app(event: bytes) -> Litestar:
    clock = Clock()

    async def events(count: int, interval_s: float) -> AsyncIterator[bytes]:
        for _ in range(count):
            if interval_s:
                await clock.tick(interval_s)
            yield event
        yield b"data: [DONE]\n\n"

    @get("/events", media_type="text/event-stream")
    async def ready_made(count: int, interval_s: float = 0.0) -> Stream:
        return Stream(events(count, interval_s))

    return Litestar([ready_made], openapi_config=None, logging_config=None)


async def serve(port: int, event: bytes) -> None:
    await serve_http(create_app(event), bind("127.0.0.1", port), stop_event(), drain_timeout_s=1.0)


def main() -> int:
    port, event = int(sys.argv[1]), sys.argv[2]
    return run_service(lambda: serve(port, event.encode()), service="bare")


if __name__ == "__main__":
    sys.exit(main())
