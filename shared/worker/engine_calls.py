"""Questions to the engine that it answers with the same tag."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from phloem.shared.batch_queue import BatchQueue
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.engine import (
    AuditReply,
    AuditRequest,
    DumpTree,
    EngineMessage,
    FlushCache,
    Reply,
)

CALL_TIMEOUT_S = 30.0


class EngineCalls:
    """Matches replies to the callers that wait for them; each caller waits at most `CALL_TIMEOUT_S`."""

    def __init__(self, outbox: BatchQueue[EngineMessage]) -> None:
        self._outbox = outbox
        self._waiting: dict[int, asyncio.Future[Reply | AuditReply]] = {}
        self._next_tag = 1

    async def flush(self) -> None:
        """Empties the radix tree of what no request holds. Raises `PhloemError`."""
        reply = await self._call(FlushCache)
        if isinstance(reply, Reply) and reply.error is not None:
            raise PhloemError.from_info(reply.error)

    async def audit(self) -> AuditReply:
        """Who owns the pages of the KV pool. Raises `PhloemError`."""
        reply = await self._call(AuditRequest)
        if isinstance(reply, AuditReply):
            return reply
        if reply.error is not None:
            raise PhloemError.from_info(reply.error)
        raise PhloemError("bad_message", "the engine answered without an audit")

    def request_dump(self) -> None:
        """The `TreeDump` comes in order with the step reports; nobody waits for it here."""
        self._outbox.force(DumpTree(self._tag()))

    def resolve(self, reply: Reply | AuditReply) -> None:
        waiting = self._waiting.pop(reply.tag, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(reply)

    async def _call(self, message: Callable[[int], EngineMessage]) -> Reply | AuditReply:
        tag = self._tag()
        future: asyncio.Future[Reply | AuditReply] = asyncio.get_running_loop().create_future()
        self._waiting[tag] = future
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                await self._outbox.put(message(tag))
                return await future
        except TimeoutError as error:
            raise PhloemError(
                "deadline_exceeded", "the engine did not answer in time", retryable=True, http_status=504
            ) from error
        finally:
            self._waiting.pop(tag, None)

    def _tag(self) -> int:
        self._next_tag += 1
        return self._next_tag
