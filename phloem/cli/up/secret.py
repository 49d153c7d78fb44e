"""Keeps the cluster's secret in Redis, where services that join the cluster later look for it."""

from __future__ import annotations

from contextlib import aclosing, suppress

from phloem.shared.discovery.registry import Registry
from phloem.shared.discovery.secret import reassert_secret
from phloem.shared.errors import PhloemError


async def keep_secret(redis_url: str, secret: bytes) -> None:
    """Puts an agreed secret back whenever Redis came back without its data; never ends. A configured one is
    not to be written: don't call this for it."""
    registry = Registry(redis_url)
    kept = ""
    try:
        async with aclosing(registry.watch()) as snapshots:
            async for snapshot in snapshots:
                if snapshot.redis_ok and snapshot.generation != kept:
                    with suppress(PhloemError):  # lost again: the next snapshot tells
                        await reassert_secret(registry, secret)
                        kept = snapshot.generation
    finally:
        await registry.close()
