"""The calls of cache_index: Attach, Publish, Verify, Match, and the stream of look-ups."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, contextmanager

from phloem.services.cache_index.announcer import Announcer
from phloem.services.cache_index.lookup_session import LookupSession
from phloem.services.cache_index.matcher import Matcher
from phloem.services.cache_index.metrics import IndexMetrics
from phloem.services.cache_index.near_cache import NearCache
from phloem.services.cache_index.slots import Slots
from phloem.services.cache_index.store import BlockStore
from phloem.shared.block_hash import HASH_BYTES, landmarks
from phloem.shared.errors import PhloemError, invalid_request
from phloem.shared.protocol.index import (
    INDEX_SERVICE,
    Announce,
    Answer,
    Attach,
    Attached,
    IndexDown,
    Match,
    Matched,
    Publish,
    Published,
    Verified,
    Verify,
    attach,
    attached,
    index_down,
    index_up,
    match,
    matched,
    publish,
    published,
    verified,
    verify,
)
from phloem.shared.rpc.server import RpcServer

MAX_MATCH_BLOCKS = 262_144
MAX_PUBLISH_BLOCKS = 262_144
MAX_WORKER_ID_CHARS = 256
MAX_SAMPLE_BLOCKS = 1_024
MAX_LANDMARKS = len(landmarks(MAX_MATCH_BLOCKS))


class IndexService:
    """Validates, measures, and passes on. Holds nothing that another replica would need."""

    def __init__(
        self,
        store: BlockStore,
        slots: Slots,
        matcher: Matcher,
        near: NearCache,
        announcer: Announcer,
        metrics: IndexMetrics,
    ) -> None:
        self._store = store
        self._slots = slots
        self._matcher = matcher
        self._near = near
        self._announcer = announcer
        self._metrics = metrics

    def add_to(self, server: RpcServer) -> None:
        server.add_unary(INDEX_SERVICE, "Attach", attach, attached, self.on_attach)
        server.add_unary(INDEX_SERVICE, "Publish", publish, published, self.on_publish)
        server.add_unary(INDEX_SERVICE, "Verify", verify, verified, self.on_verify)
        server.add_unary(INDEX_SERVICE, "Match", match, matched, self.on_match)
        server.add_stream(INDEX_SERVICE, "Lookups", index_down, index_up, self.serve_lookups)

    async def on_attach(self, message: Attach) -> Attached:
        with self._measured("Attach"):
            _check_worker_id(message.worker.worker_id)
            return Attached(await self._slots.attach(message.worker))

    async def on_publish(self, message: Publish) -> Published:
        """Applies a worker's changes. Raises `PhloemError`: what is malformed, a gap in its sequence (it then
        publishes everything), a slot that is not its own, Redis away."""
        with self._measured("Publish"):
            _check_worker_id(message.worker.worker_id)
            _check_slot(message.slot)
            _check_seq(message.seq)
            _check_hashes(message.removed, MAX_PUBLISH_BLOCKS - len(message.stored), "removed")
            _check_hashes(message.stored, MAX_PUBLISH_BLOCKS, "stored")
            try:
                await self._store.publish(message)
            finally:  # parts of it may have been applied
                self._near.forget(message.removed)
                self._near.forget(message.stored)
        self._metrics.published_blocks.labels("stored").inc(len(message.stored))
        self._metrics.published_blocks.labels("removed").inc(len(message.removed))
        return Published(message.seq)

    async def on_verify(self, message: Verify) -> Verified:
        with self._measured("Verify"):
            _check_worker_id(message.worker.worker_id)
            _check_slot(message.slot)
            _check_hashes(message.sample, MAX_SAMPLE_BLOCKS, "sample")
            await self._store.verify(message)
        return Verified(message.seq)

    async def on_match(self, message: Match) -> Matched:
        with self._measured("Match"):
            _check_hashes(message.block_hashes, MAX_MATCH_BLOCKS, "block_hashes")
            answer = await self._matcher.match(message.block_hashes)
        self._metrics.asked_blocks.inc(len(message.block_hashes))
        self._metrics.matched_blocks.inc(answer.holders[0].num_blocks if answer.holders else 0)
        return answer

    async def serve_lookups(self, frames: AsyncIterator[list[IndexDown]]) -> AsyncIterator[list[Answer]]:
        """A gateway's stream, until either side ends it."""
        session = LookupSession(self.on_match, self.on_announce)
        async with aclosing(session.serve(frames)) as answers:
            async for batch in answers:
                yield batch

    def on_announce(self, message: Announce) -> None:
        """Never waits and never raises: a malformed one is counted."""
        try:
            _check_worker_id(message.worker.worker_id)
            _check_hashes(message.block_hashes, MAX_LANDMARKS, "block_hashes")
        except PhloemError as error:
            self._metrics.errors.labels("Announce", error.code).inc()
        else:
            self._announcer.announce(message)

    @contextmanager
    def _measured(self, method: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        except PhloemError as error:
            self._metrics.errors.labels(method, error.code).inc()
            raise
        self._metrics.call_seconds.labels(method).observe(time.perf_counter() - start)


def _check_worker_id(worker_id: str) -> None:
    if not 0 < len(worker_id) <= MAX_WORKER_ID_CHARS:
        raise invalid_request(
            f"a worker's name must have 1 to {MAX_WORKER_ID_CHARS} characters", param="worker_id"
        )


def _check_slot(slot: int) -> None:
    # Redis would grow a string to hold any bit it is told to set; the slot's owner is checked there.
    if not 0 <= slot < 1 << 16:
        raise invalid_request(f"there is no slot {slot}", param="slot")


def _check_seq(seq: int) -> None:
    # 0 stands for "nothing applied yet", and so would look like a message that was sent twice.
    if seq < 1:
        raise invalid_request("seq starts at 1", param="seq")


def _check_hashes(block_hashes: Sequence[bytes], limit: int, param: str) -> None:
    if len(block_hashes) > limit:
        raise invalid_request(f"more than {limit} blocks in one call: send several", param=param)
    if not set(map(len, block_hashes)) <= {HASH_BYTES}:
        raise invalid_request(f"a block hash has {HASH_BYTES} bytes", param=param)
