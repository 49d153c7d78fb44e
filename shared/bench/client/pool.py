"""Connections to one server, kept alive between requests."""

from __future__ import annotations

import asyncio
import ssl
import time
from urllib.parse import urlsplit

from phloem.shared.bench.client.connection import Connection, Inbox
from phloem.shared.errors import ConfigError

# Below the keep-alive time of any common server (uvicorn: 5 s), so that it rarely closes under a request.
_MAX_IDLE_S = 2.0
_CONNECT_TIMEOUT_S = 10.0


class Endpoint:
    """Where a base URL leads. Raises `ConfigError` when it is not an http or https URL."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is not an http:// or https:// URL")
        if parts.username or parts.password:
            raise ConfigError("a URL must not hold a password: it would be recorded; use --api-key")
        self.host = parts.hostname
        self.is_tls = parts.scheme == "https"
        self.port = parts.port or (443 if self.is_tls else 80)
        self.path = parts.path.rstrip("/")
        self.authority = parts.netloc


class ConnectionPool:
    """Hands out connections: the one used last that is still open, else a new one. Unbounded, as the load
    decides how many requests are in flight."""

    def __init__(self, endpoint: Endpoint, inbox: Inbox) -> None:
        self._endpoint = endpoint
        self._inbox = inbox
        self._idle: list[Connection] = []
        self._tls = ssl.create_default_context() if endpoint.is_tls else None

    def take_idle(self) -> Connection | None:
        """A kept-alive connection, or None."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_reusable and time.monotonic() - connection.idle_since_s < _MAX_IDLE_S:
                return connection
            connection.close()
        return None

    async def open(self) -> Connection:
        """A new connection. Raises `OSError` (TimeoutError after 10 s)."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            _, connection = await loop.create_connection(
                lambda: Connection(self._inbox), self._endpoint.host, self._endpoint.port, ssl=self._tls
            )
        return connection

    def give_back(self, connection: Connection) -> None:
        """For the next request, if the server keeps it open."""
        if connection.is_reusable:
            connection.idle_since_s = time.monotonic()
            self._idle.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        """Closes the idle ones; those in use are their users'."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()
