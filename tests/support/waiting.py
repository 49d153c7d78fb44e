"""Waiting for a condition with a deadline, instead of sleeping for a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

_INTERVAL_S = 0.005


async def until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Returns once `condition()` is true; raises TimeoutError after `timeout_s`."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is awaited has no event
            await asyncio.sleep(_INTERVAL_S)


async def until_async(condition: Callable[[], Awaitable[object]], timeout_s: float = 10.0) -> None:
    """As `until`, for a condition that must itself be awaited."""
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110 - as above
            await asyncio.sleep(_INTERVAL_S)
