"""One request and its answer, while the client listens.

A handler returns an `Exchange`; its work runs as long as the client is there and is cancelled when it goes
away. Nothing is sent before the work has something to say, so that an error still has its HTTP status; after
that an error is the last event of the stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

from litestar.types import HTTPResponseStartEvent, Receive, Scope, Send

from phloem.services.gateway.api.access import CLIENT_GONE, SERVER_SEND, log_fields_of
from phloem.services.gateway.api.errors import error_body, info_of

EVENT_STREAM = b"text/event-stream; charset=utf-8"
JSON = b"application/json"


class Reply:
    """Sends either one JSON body or a stream of server-sent events. `log_fields` go into the log line.

    `send` takes the head of the answer, through all layers; `write` is the server's own: bodies go straight
    to it, as no layer of this application looks at them."""

    def __init__(self, send: Send, write: Send, log_fields: dict[str, object]) -> None:
        self._send = send
        self._write = write
        self.log_fields = log_fields
        self.started = False

    async def json(self, body: bytes, status: int = 200) -> None:
        """The whole answer."""
        await self._start(status, [(b"content-type", JSON), (b"content-length", str(len(body)).encode())])
        await self._write({"type": "http.response.body", "body": body, "more_body": False})

    def events(self, events: Sequence[bytes]) -> Awaitable[None]:
        """When awaited, sends `events`, each the data of one, in one write; waits while the client is slow to
        read. No coroutine of its own once the answer has begun: this runs for every token."""
        if not events:
            return _nothing()
        data = b"data: " + b"\n\ndata: ".join(events) + b"\n\n"
        if not self.started:
            return self._first_events(data)
        return self._write({"type": "http.response.body", "body": data, "more_body": True})

    async def _first_events(self, data: bytes) -> None:
        await self._start(200, [(b"content-type", EVENT_STREAM), (b"cache-control", b"no-cache")])
        await self._write({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        """Ends the stream of events."""
        await self._write({"type": "http.response.body", "body": b"", "more_body": False})

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.started = True
        start: HTTPResponseStartEvent = {
            "type": "http.response.start",
            "status": status,
            "headers": headers,
        }
        await self._send(start)


async def _nothing() -> None:
    """Nothing is to be said."""


Work: TypeAlias = Callable[[Reply], Awaitable[None]]


class Exchange:
    """An ASGI application for one answer. Raises what `work` raises if nothing was sent yet.

    When the client left, it says so in the request's state; also when the client holds the connection and
    reads no more, so that the error that ends its stream can't be sent within `last_word_s`."""

    def __init__(self, work: Work, last_word_s: float = 5.0) -> None:
        self._work = work
        self._last_word_s = last_word_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(send, scope["state"][SERVER_SEND], log_fields_of(scope))
        work = asyncio.ensure_future(self._work(reply))
        gone = asyncio.create_task(_wait_until_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            was_done = work.done()
            await _cancel(work, gone)
        if not was_done:
            scope["state"][CLIENT_GONE] = True
            return
        try:
            async with asyncio.timeout(self._last_word_s):
                await _conclude(work, reply)
        except TimeoutError:
            scope["state"][CLIENT_GONE] = True


async def _conclude(work: asyncio.Future[None], reply: Reply) -> None:
    error = work.exception()
    if error is None:
        return
    if not reply.started:
        raise error
    info = info_of(error)
    reply.log_fields["error"] = info.code
    await reply.events([error_body(info)])
    await reply.end()


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[None]) -> None:
    """Cancels and waits: on return the generators in them are closed, so the workers have been told."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
