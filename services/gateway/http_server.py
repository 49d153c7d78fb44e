"""uvicorn, bound before it starts, told when to stop, and with a bound on request heads."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Generator

import uvicorn
from litestar.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from phloem.services.gateway.api.errors import error_body
from phloem.shared.errors import ConfigError, ErrorInfo
from phloem.shared.host_port import host_port

MAX_HEAD_BYTES = 64 * 1024
_KEEP_ALIVE_S = 75
_BACKLOG = 2048


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `ConfigError` when the address is in use or not this machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"--host {host}: {error.strerror or error}", param="host") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"can't listen on {host_port(host, port)}: {error.strerror}. Choose another --port, or stop what "
            "uses it.",
            param="port",
        ) from error
    listener.setblocking(False)
    return listener


async def serve_http(
    app: ASGIApp, listener: socket.socket, stop: asyncio.Event, *, drain_timeout_s: float
) -> None:
    """Serves until `stop` is set, then takes no more and waits for requests under way; those that last longer
    than `drain_timeout_s` are aborted. Owns `listener`."""
    config = uvicorn.Config(
        app,
        http=_BoundedHttpProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=logging.WARNING,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nothing here asks for the client's address, and headers can lie about it
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(drain_timeout_s)),
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve([listener]), name="http")
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        await serving
    finally:
        stopping.cancel()
        serving.cancel()
        await asyncio.gather(serving, stopping, return_exceptions=True)
        for listening in server.servers:
            listening.close()
        listener.close()


class _Server(uvicorn.Server):
    """Leaves signals to the process."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.servers = []  # also when it is stopped before it has started

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class _BoundedHttpProtocol(HttpToolsProtocol):
    """Counts the bytes of a request's head, which the parser would collect without end."""

    _in_head = True
    _head_bytes = 0

    def data_received(self, data: bytes) -> None:
        was_in_head = self._in_head
        super().data_received(data)
        # A head that was complete has reset the count; of one that began in this piece only the rest counts.
        if was_in_head and self._in_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(ErrorInfo("headers_too_large", "the request head is too long", http_status=431))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._in_head = False
        self._head_bytes = 0

    def send_400_response(self, msg: str) -> None:
        self._refuse(ErrorInfo("bad_request", msg, http_status=400))

    def _refuse(self, info: ErrorInfo) -> None:
        body = error_body(info)
        head = (
            f"HTTP/1.1 {info.http_status} \r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
