"""One gateway's stream: look-ups and announcements come down, answers go up as they are found."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

from phloem.shared.batch_queue import BatchQueue
from phloem.shared.errors import PhloemError, overloaded
from phloem.shared.protocol.index import Announce, Answer, IndexDown, Lookup, Match, Matched

log = logging.getLogger(__name__)

MAX_LOOKUPS_UNDER_WAY = 512


class LookupSession:
    """Serves one stream. Look-ups run side by side, up to a bound; more are refused at once, since whoever
    asks waits milliseconds only. An answer that is late is sent all the same, and ignored there."""

    def __init__(
        self, on_match: Callable[[Match], Awaitable[Matched]], on_announce: Callable[[Announce], None]
    ) -> None:
        self._on_match = on_match
        self._on_announce = on_announce
        self._under_way: set[asyncio.Task[None]] = set()
        self._answers: BatchQueue[Answer] = BatchQueue(2 * MAX_LOOKUPS_UNDER_WAY)

    async def serve(self, frames: AsyncIterator[list[IndexDown]]) -> AsyncGenerator[list[Answer], None]:
        """Until the gateway ends the stream or goes away; an empty frame says that it is open."""
        reading = asyncio.create_task(self._read(frames))
        try:
            yield []  # the stream is open
            while answers := await self._answers.take_all():
                yield answers
        finally:
            for task in (reading, *self._under_way):
                task.cancel()
            await asyncio.gather(reading, *self._under_way, return_exceptions=True)

    async def _read(self, frames: AsyncIterator[list[IndexDown]]) -> None:
        try:
            async for frame in frames:
                for message in frame:
                    self._receive(message)
        except Exception as error:  # grpc raises bare errors when the caller is gone
            log.info("a gateway's stream broke: %s", error)
        finally:
            self._answers.close()

    def _receive(self, message: IndexDown) -> None:
        match message:
            case Announce():
                self._on_announce(message)
            case Lookup(number, _) if len(self._under_way) >= MAX_LOOKUPS_UNDER_WAY:
                refusal = overloaded("too many look-ups are under way")
                self._answers.offer(Answer(number, error=refusal.info))
            case Lookup():
                task = asyncio.create_task(self._answer(message))
                self._under_way.add(task)
                task.add_done_callback(self._under_way.discard)

    async def _answer(self, lookup: Lookup) -> None:
        try:
            answer = Answer(lookup.id, await self._on_match(Match(lookup.block_hashes)))
        except PhloemError as error:
            answer = Answer(lookup.id, error=error.info)
        self._answers.offer(answer)  # a gateway that does not read loses answers, not our memory
