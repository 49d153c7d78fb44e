"""Prometheus over a tiny HTTP server, for the processes that have no other (workers and the index)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Info, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

import phloem
from phloem.shared.errors import PhloemError
from phloem.shared.host_port import host_port

_MAX_HEAD_BYTES = 8192
_REQUEST_TIMEOUT_S = 5.0
_PLAIN_TEXT = "text/plain; charset=utf-8"


def new_registry(service: str) -> CollectorRegistry:
    """A registry with the process's own figures and `phloem_build_info`; the service adds its metrics."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    build = Info("phloem_build", "What runs here.", registry=registry)
    build.info({"version": phloem.__version__, "service": service})
    return registry


class MetricsServer:
    """GET /metrics (Prometheus) and GET /health (503 while `healthy` says no). Make it with `start`."""

    def __init__(self, registry: CollectorRegistry, healthy: Callable[[], bool]) -> None:
        self._registry = registry
        self._healthy = healthy
        self._server: asyncio.Server | None = None
        self.port = 0

    @classmethod
    async def start(
        cls,
        registry: CollectorRegistry,
        host: str,
        port: int,
        *,
        healthy: Callable[[], bool] = lambda: True,
    ) -> MetricsServer:
        """Listens on `host`:`port` (0: a free port, see `.port`).

        Raises `PhloemError` (`port_in_use`) when it can't.
        """
        self = cls(registry, healthy)
        try:
            self._server = await asyncio.start_server(self._serve, host, port, limit=_MAX_HEAD_BYTES)
        except OSError as error:
            raise PhloemError(
                "port_in_use",
                f"can't serve metrics on {host_port(host, port)} ({error.strerror}): choose another "
                "--metrics-port.",
            ) from error
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def close(self) -> None:
        """Stops listening. Harmless when called twice."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_REQUEST_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._answer(head))
                await writer.drain()
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            pass  # a slow, broken or oversized request gets no answer
        finally:
            writer.close()

    def _answer(self, head: bytes) -> bytes:
        method, _, rest = head.partition(b"\r\n")[0].partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        if method not in (b"GET", b"HEAD"):
            return _response("405 Method Not Allowed", _PLAIN_TEXT, b"only GET\n")
        if path == b"/metrics":
            return _response("200 OK", CONTENT_TYPE_LATEST, generate_latest(self._registry))
        if path == b"/health":
            healthy = self._healthy()
            return _response("200 OK" if healthy else "503 Service Unavailable", _PLAIN_TEXT, b"")
        return _response("404 Not Found", _PLAIN_TEXT, b"try /metrics or /health\n")


def _response(status: str, content_type: str, body: bytes) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n"
        "connection: close\r\n\r\n"
    )
    return head.encode() + body
