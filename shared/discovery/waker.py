"""Waits for an announcement over pub/sub, with the poll interval as the bound."""

from __future__ import annotations

import asyncio
import time

import redis.asyncio as aioredis
from redis.exceptions import RedisError

from phloem.shared.discovery.redis_link import RedisLink

# A storm of announcements makes one read per this time.
_COALESCE_S = 0.02


class EventWaker:
    """One subscription, made on first use and again after it broke. Announcements are hints: a lost one
    costs at most the wait."""

    def __init__(self, link: RedisLink, channel: str) -> None:
        self._link = link
        self._channel = channel
        self._pubsub: aioredis.client.PubSub | None = None

    async def wait(self, timeout_s: float) -> None:
        """Returns after an announcement, after `timeout_s`, or at once when it has just subscribed, since
        what was announced before it is lost; never raises for Redis."""
        deadline = time.monotonic() + timeout_s
        try:
            async with asyncio.timeout(timeout_s + self._link.timeout_s):
                if self._pubsub is None:
                    await self._subscribe()
                else:
                    await self._announcement(self._pubsub, deadline)
        except (RedisError, OSError, TimeoutError):
            await self.close()
            await asyncio.sleep(max(0.0, deadline - time.monotonic()))

    async def close(self) -> None:
        pubsub, self._pubsub = self._pubsub, None
        if pubsub is not None:
            await pubsub.aclose()  # type: ignore[no-untyped-call]

    async def _subscribe(self) -> None:
        self._pubsub = self._link.subscriber()
        await self._pubsub.subscribe(self._channel)
        # The server's confirmation, which is not an announcement.
        await self._pubsub.get_message(timeout=self._link.timeout_s)

    async def _announcement(self, pubsub: aioredis.client.PubSub, deadline: float) -> None:
        while (left_s := deadline - time.monotonic()) > 0:
            if await pubsub.get_message(timeout=left_s) is not None:
                return await self._drain(pubsub)

    async def _drain(self, pubsub: aioredis.client.PubSub) -> None:
        """Announcements that come together make one read."""
        end = time.monotonic() + _COALESCE_S
        while (left_s := end - time.monotonic()) > 0:
            await pubsub.get_message(timeout=left_s)
