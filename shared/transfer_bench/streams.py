"""What an engine process said about one request, with the time of each token."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from phloem.shared.errors import ErrorInfo, PhloemError
from phloem.shared.protocol.session import Ended, EndReason, Output


@dataclass
class EngineStream:
    """`token_times_s` (monotonic) are the arrivals of the reports, one for each token of `token_ids`;
    `ended_at_s` is that of the last one."""

    request_id: str
    token_ids: list[int] = field(default_factory=list)
    token_times_s: list[float] = field(default_factory=list)
    num_cached_tokens: int = 0
    reason: EndReason | None = None
    error: ErrorInfo | None = None
    ended_at_s: float = 0.0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, output: Output, now_s: float) -> None:
        """Raises `PhloemError` when the engine says something after the request's end."""
        if self.reason is not None:
            raise PhloemError("bad_message", f"{self.request_id} goes on after its end: {output}")
        if isinstance(output, Ended):
            self.reason, self.error, self.ended_at_s = output.reason, output.error, now_s
        else:
            self.token_ids += output.token_ids
            self.token_times_s += [now_s] * len(output.token_ids)
            self.num_cached_tokens += output.num_cached_tokens
        self.changed.set()

    def break_off(self, error: ErrorInfo, now_s: float) -> None:
        """The engine is gone: what has not ended fails."""
        if self.reason is None:
            self.reason, self.error, self.ended_at_s = "failed", error, now_s
            self.changed.set()

    async def until_tokens(self, count: int, timeout_s: float) -> None:
        """Until `count` tokens have come or the request has ended. Raises `PhloemError` after `timeout_s`."""
        await self._until(lambda: len(self.token_ids) >= count, timeout_s, f"token {count - 1}")

    async def until_end(self, timeout_s: float) -> None:
        """Raises `PhloemError` after `timeout_s`."""
        await self._until(lambda: False, timeout_s, "the end")

    async def _until(self, enough: Callable[[], bool], timeout_s: float, what: str) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while not enough() and self.reason is None:
                    self.changed.clear()
                    await self.changed.wait()
        except TimeoutError as error:
            message = f"{self.request_id}: no {what} within {timeout_s:.0f} s"
            raise PhloemError("bench_timeout", message) from error
