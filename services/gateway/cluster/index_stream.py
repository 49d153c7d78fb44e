"""One long-lived stream to one cache_index replica: look-ups and announcements down, answers up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence

import grpc.aio

from phloem.shared.batch_queue import BatchQueue
from phloem.shared.errors import PhloemError, overloaded, unavailable
from phloem.shared.protocol.index import (
    INDEX_SERVICE,
    Announce,
    Answer,
    IndexDown,
    Lookup,
    Matched,
    index_down,
    index_up,
)
from phloem.shared.rpc.client import RpcChannel, RpcStream

log = logging.getLogger(__name__)

MAX_WAITING = 1024
MIN_BACKOFF_S = 0.1
MAX_BACKOFF_S = 1.0


class IndexStream:
    """Opened again whenever it breaks, until `run` is cancelled. What waits goes out in one frame."""

    def __init__(self, address: str, cluster_secret: bytes) -> None:
        self.up = True  # until the first attempt has failed, so that nobody waits for it
        self._channel = RpcChannel(address, cluster_secret)
        self._outbox: BatchQueue[IndexDown] = BatchQueue(MAX_WAITING)
        self._waiting: dict[int, asyncio.Future[Matched]] = {}
        self._num_lookups = 0

    async def lookup(self, block_hashes: list[bytes]) -> Matched:
        """The caller bounds the wait. Raises `PhloemError`: the replica's, or that the stream broke."""
        self._num_lookups += 1
        number = self._num_lookups
        future: asyncio.Future[Matched] = asyncio.get_running_loop().create_future()
        if not self._outbox.offer(Lookup(number, block_hashes)):
            raise overloaded("too many look-ups wait for the index")
        self._waiting[number] = future
        try:
            return await future
        finally:
            del self._waiting[number]

    def announce(self, message: Announce) -> bool:
        """False when it was dropped: too much waits already."""
        return self.up and self._outbox.offer(message)

    async def run(self) -> None:
        """Keeps the stream open until cancelled."""
        backoff_s = MIN_BACKOFF_S
        try:
            while True:
                error = await self._one_stream()
                backoff_s = MIN_BACKOFF_S if self.up else min(MAX_BACKOFF_S, backoff_s * 2)
                log.debug("the stream to the index broke: %s", error, extra={"index": self._channel.address})
                self._break(error)
                await asyncio.sleep(backoff_s)
        finally:
            self._break(unavailable("the index replica has left", code="peer_unavailable"))
            await self._channel.close()

    async def _one_stream(self) -> PhloemError:
        """From the first frame to the break; returns its reason."""
        try:
            await self._talk()
        except PhloemError as error:
            return error
        except grpc.aio.BaseError as error:
            return unavailable(f"gRPC failed: {error}", code="peer_unavailable")
        return unavailable("the replica ended the stream", code="peer_unavailable")

    async def _talk(self) -> None:
        stream = self._channel.stream(INDEX_SERVICE, "Lookups", index_down, index_up)
        await stream.drive(self._read(aiter(stream.__aiter__())), self._write(stream))

    async def _read(self, frames: AsyncIterator[list[Answer]]) -> None:
        async for answers in frames:
            self.up = True
            for answer in answers:
                self._resolve(answer)

    async def _write(self, stream: RpcStream[list[IndexDown], list[Answer]]) -> None:
        await stream.write([])  # opens it, before anybody waits
        while messages := await self._outbox.take_all():
            await stream.write(messages)

    def _resolve(self, answer: Answer) -> None:
        """An answer that nobody waits for any more is dropped."""
        future = self._waiting.get(answer.id)
        if future is None or future.done():
            return
        if answer.matched is not None:
            future.set_result(answer.matched)
        elif answer.error is not None:
            future.set_exception(PhloemError.from_info(answer.error))

    def _break(self, error: PhloemError) -> None:
        self.up = False
        self._outbox.take_now()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(error)


def first_up(streams: Sequence[IndexStream], start: int) -> IndexStream | None:
    """The first stream that is up, from `start` on, round; None when none is."""
    order = (streams[(start + offset) % len(streams)] for offset in range(len(streams)))
    return next((stream for stream in order if stream.up), None)
