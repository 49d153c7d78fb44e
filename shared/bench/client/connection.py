"""One HTTP/1.1 connection, written for stamping: reads are timed first and parsed afterwards."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol, cast

import httptools

from phloem.shared.bench.client.lag import LagMeter

_MAX_ERROR_BYTES = 16 * 1024


class ConnectionBroken(Exception):
    """The connection ended before the response did. `before_answer`: not one byte of it had come."""

    def __init__(self, message: str, *, before_answer: bool) -> None:
        super().__init__(message)
        self.before_answer = before_answer


class BodySink(Protocol):
    """Takes the body of a successful response as it arrives."""

    def body(self, data: bytes, at_s: float) -> None: ...


class Inbox:
    """Reads that were stamped but not yet parsed, of all connections.

    A server that steps its batch writes to hundreds of streams at once. Parsing each read before the next is
    taken off its socket would stamp the last one late by the parsing of all others; so a read only stores
    the clock and its bytes, and the parsing runs once the loop has emptied every ready socket.
    """

    def __init__(self, lag: LagMeter) -> None:
        self._lag = lag
        self._reads: list[tuple[float, Connection, bytes]] = []
        self._loop = asyncio.get_running_loop()

    def put(self, connection: Connection, data: bytes) -> None:
        if not self._reads:
            self._loop.call_soon(self.flush)
        self._reads.append((time.monotonic(), connection, data))

    def flush(self) -> None:
        """Parses everything that was put."""
        reads, self._reads = self._reads, []
        if not reads:
            return
        for at_s, connection, data in reads:
            connection.parse(data, at_s)
        self._lag.note_span(time.monotonic() - reads[0][0])


class Connection(asyncio.Protocol):
    """Carries one exchange at a time. The pool opens it, `exchange` uses it."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._done: asyncio.Future[int] | None = None
        self._sink: BodySink | None = None
        self._at_s = 0.0
        self._has_answer = False
        self._is_keep_alive = False
        self._until_close = False
        self.error_body = b""
        self.idle_since_s = 0.0

    @property
    def is_reusable(self) -> bool:
        transport = self._transport
        return self._is_keep_alive and transport is not None and not transport.is_closing()

    async def exchange(self, payload: bytes, sink: BodySink) -> int:
        """Sends a whole request and returns the status once the response has ended.

        The body of a 200 goes to `sink`, the first bytes of any other to `error_body`. Raises
        `ConnectionBroken`. A cancelled exchange leaves the connection unusable: close it.
        """
        if self._transport is None or self._transport.is_closing():
            raise ConnectionBroken("the server closed the connection", before_answer=True)
        self._parser = httptools.HttpResponseParser(self)
        self._done = asyncio.get_running_loop().create_future()
        self._sink, self.error_body = sink, b""
        self._has_answer = self._is_keep_alive = self._until_close = False
        self._transport.write(payload)
        try:
            return await self._done
        finally:
            self._done = self._sink = None

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it

    def data_received(self, data: bytes) -> None:
        self._inbox.put(self, data)

    def connection_lost(self, error: Exception | None) -> None:
        self._inbox.flush()
        self._transport = None
        if self._done is None or self._done.done():
            return
        if self._until_close and error is None:
            self._done.set_result(200)
        else:
            reason = str(error) if error is not None else "the server closed the connection"
            self._fail(reason)

    def parse(self, data: bytes, at_s: float) -> None:
        """Called by the inbox: `data` was read at `at_s`."""
        if self._parser is None or self._done is None or self._done.done():
            return
        self._at_s = at_s
        self._has_answer = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"not an HTTP response: {error}")

    # httptools' side

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        self._until_close = self._parser.get_status_code() == 200 and not self._parser.should_keep_alive()

    def on_body(self, data: bytes) -> None:
        assert self._parser is not None
        if self._parser.get_status_code() == 200:
            if self._sink is not None:
                self._sink.body(data, self._at_s)
        elif len(self.error_body) < _MAX_ERROR_BYTES:
            self.error_body += data

    def on_message_complete(self) -> None:
        parser, done = self._parser, self._done
        assert parser is not None
        self._is_keep_alive = parser.should_keep_alive()
        if done is not None and not done.done():
            done.set_result(parser.get_status_code())

    def _fail(self, reason: str) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionBroken(reason, before_answer=not self._has_answer))
        self.close()
