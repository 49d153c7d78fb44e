"""A cache_index that answers what a test tells it to: real gRPC, no Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from phloem.services.cache_index.lookup_session import LookupSession
from phloem.shared.errors import unavailable
from phloem.shared.protocol.index import (
    INDEX_SERVICE,
    Announce,
    Answer,
    IndexDown,
    Match,
    Matched,
    index_down,
    index_up,
)
from phloem.shared.rpc.server import RpcServer


class FakeIndex:
    """One answer to everything, after `late_s`, or an error while it is `broken`."""

    def __init__(self, answer: Matched) -> None:
        self.answer = answer
        self.asked: list[list[bytes]] = []
        self.announced: list[Announce] = []
        self.late_s = 0.0
        self.broken = False
        self.num_streams = 0
        self.address = ""

    async def on_match(self, message: Match) -> Matched:
        self.asked.append(message.block_hashes)
        await asyncio.sleep(self.late_s)
        if self.broken:
            raise unavailable("no Redis", code="redis_unavailable")
        return self.answer

    async def serve(self, frames: AsyncIterator[list[IndexDown]]) -> AsyncIterator[list[Answer]]:
        self.num_streams += 1
        async for answers in LookupSession(self.on_match, self.announced.append).serve(frames):
            yield answers

    @asynccontextmanager
    async def serving(self, secret: bytes, port: int = 0) -> AsyncIterator[int]:
        """The port that it listens on."""
        server = RpcServer(secret)
        server.add_stream(INDEX_SERVICE, "Lookups", index_down, index_up, self.serve)
        bound = await server.start("127.0.0.1", port)
        self.address = f"127.0.0.1:{bound}"
        try:
            yield bound
        finally:
            await server.stop(0)
