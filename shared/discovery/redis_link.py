"""One pooled connection to Redis or Valkey: a deadline on every command, typed errors, no hidden retries."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from hashlib import sha1
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import hiredis
import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, NoScriptError, RedisError

from phloem.shared.errors import ConfigError, PhloemError

log = logging.getLogger(__name__)

Argument: TypeAlias = bytes | str | int
Command: TypeAlias = tuple[Argument, ...]

_PROBE_INTERVAL_S = 1.0


class Script:
    """A Lua script, called by its digest; the server is given the source when it doesn't know it."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.sha = sha1(source.encode(), usedforsecurity=False).hexdigest()


class PackedInC:
    """Mixed into redis-py's connection: its asyncio side packs commands in Python, which for a look-up of 128
    blocks takes longer than the look-up itself."""

    def pack_command(self, *args: Argument) -> list[bytes]:
        return [hiredis.pack_command(args)]  # type: ignore[arg-type] # its stub says: exactly one


class RedisLink:
    """Commands over a bounded pool of connections.

    Every method raises `PhloemError` `redis_unavailable` (retryable, HTTP 503) when Redis can't be reached,
    answers an error, or misses the deadline, which covers waiting for a connection too. Replies are bytes,
    int, None, or lists of them.
    """

    def __init__(self, url: str, *, timeout_s: float = 1.0, max_connections: int = 16) -> None:
        self.timeout_s = timeout_s
        self.display_url = _without_password(url)
        try:
            pool: aioredis.BlockingConnectionPool = aioredis.BlockingConnectionPool.from_url(
                url,
                max_connections=max_connections,
                timeout=timeout_s,
                # Ours covers the whole call; redis-py's own one uses `asyncio.wait_for`, which on Python 3.11
                # can swallow a cancellation.
                socket_timeout=None,
                socket_connect_timeout=timeout_s,
                retry=Retry(NoBackoff(), 0),
                protocol=2,
            )
        except ValueError as error:
            raise ConfigError(
                f"--redis-url {self.display_url!r} is not a redis://, rediss:// or unix:// URL: {error}",
                param="redis_url",
            ) from error
        connection_class = pool.connection_class
        pool.connection_class = type("PackedConnection", (PackedInC, connection_class), {})
        self._client = aioredis.Redis.from_pool(pool)

    async def command(self, *args: Argument, timeout_s: float | None = None) -> Any:
        """The reply of one command. Any: its type depends on the command; the caller narrows it.

        Raises `PhloemError` (`redis_unavailable`, retryable) past `timeout_s` (None: the link's own), and for
        whatever else goes wrong."""
        try:
            async with asyncio.timeout(timeout_s or self.timeout_s):
                return await self._client.execute_command(*args)  # type: ignore[no-untyped-call]
        except (RedisError, OSError, TimeoutError) as error:
            raise self._unavailable(error) from error

    async def pipeline(self, commands: Sequence[Command], timeout_s: float | None = None) -> list[Any]:
        """Sends all commands in one write; not a transaction. Raises as `command` does."""
        try:
            async with (
                asyncio.timeout(timeout_s or self.timeout_s),
                self._client.pipeline(transaction=False) as pipe,
            ):
                for args in commands:
                    pipe.execute_command(*args)
                return await pipe.execute()
        except (RedisError, OSError, TimeoutError) as error:
            raise self._unavailable(error) from error

    async def script(
        self,
        script: Script,
        keys: Sequence[Argument],
        args: Sequence[Argument],
        timeout_s: float | None = None,
    ) -> Any:
        """Runs a script atomically; sends its source only where Redis doesn't have it. Any, and raises: as
        for `command`."""
        tail = (len(keys), *keys, *args)
        try:
            async with asyncio.timeout(timeout_s or self.timeout_s):
                try:
                    return await self._client.execute_command(  # type: ignore[no-untyped-call]
                        "EVALSHA", script.sha, *tail
                    )
                except NoScriptError:
                    return await self._client.execute_command(  # type: ignore[no-untyped-call]
                        "EVAL", script.source, *tail
                    )
        except (RedisError, OSError, TimeoutError) as error:
            raise self._unavailable(error) from error

    def subscriber(self) -> aioredis.client.PubSub:
        """A pub/sub connection of its own; its errors are redis-py's, and the caller closes it."""
        return self._client.pubsub(ignore_subscribe_messages=True)

    async def wait_until_up(self, wait_s: float, on_wait: Callable[[float], None] | None = None) -> None:
        """Returns when Redis answers; calls `on_wait(elapsed seconds)` each second until then.

        Raises `PhloemError`: `redis_unreachable` after `wait_s`, `redis_refused` at once when Redis refuses
        the credentials.
        """
        start = time.monotonic()
        while True:
            try:
                await self.command("PING")
                return
            except PhloemError as error:
                if isinstance(error.__cause__, AuthenticationError | NoPermissionError):
                    raise self._refused(error.__cause__) from error
                elapsed = time.monotonic() - start
                if elapsed >= wait_s:
                    raise self._unreachable(wait_s, error) from error
            if on_wait is None:
                log.warning("waiting for Redis at %s (%.0f s of %.0f s)", self.display_url, elapsed, wait_s)
            else:
                on_wait(elapsed)
            await asyncio.sleep(min(_PROBE_INTERVAL_S, wait_s - elapsed))

    async def close(self) -> None:
        await self._client.aclose(close_connection_pool=True)

    def _unavailable(self, error: Exception) -> PhloemError:
        reason = str(error) or type(error).__name__
        return PhloemError(
            "redis_unavailable",
            f"Redis at {self.display_url} failed: {reason}",
            retryable=True,
            http_status=503,
            retry_after_s=1.0,
        )

    def _refused(self, error: Exception) -> PhloemError:
        return PhloemError(
            "redis_refused",
            f"Redis at {self.display_url} refuses the credentials ({error}): put user and password into "
            "--redis-url as redis://user:password@host:port",
            http_status=503,
        )

    def _unreachable(self, wait_s: float, error: PhloemError) -> PhloemError:
        return PhloemError(
            "redis_unreachable",
            f"Redis at {self.display_url} did not answer for {wait_s:.0f} s: start it, or name another one "
            f"with --redis-url ({error})",
            retryable=True,
            http_status=503,
        )


def _without_password(url: str) -> str:
    """The URL as it may be logged."""
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
    except ValueError:
        return "<unreadable>"
    return parts._replace(netloc=host, query="").geturl()
