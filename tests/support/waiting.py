"""Waiting for a condition with a deadline, instead of sleeping for a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import psutil

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


def wait_until_gone(pid: int, timeout_s: float = 5.0) -> None:
    """Returns once no process, but perhaps a zombie, has this id; raises TimeoutError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while psutil.pid_exists(pid) and not _is_zombie(pid):
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {pid} is still there")
        time.sleep(_INTERVAL_S)


def _is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
