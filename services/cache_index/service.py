"""The calls of cache_index: Attach, Publish, Match."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from phloem.services.cache_index.matcher import Matcher
from phloem.services.cache_index.metrics import IndexMetrics
from phloem.services.cache_index.slots import Slots
from phloem.services.cache_index.store import BlockStore
from phloem.shared.block_hash import HASH_BYTES
from phloem.shared.errors import PhloemError, invalid_request
from phloem.shared.protocol.index import (
    INDEX_SERVICE,
    Attach,
    Attached,
    Match,
    Matched,
    Publish,
    Published,
    attach,
    attached,
    match,
    matched,
    publish,
    published,
)
from phloem.shared.rpc.server import RpcServer

MAX_MATCH_BLOCKS = 262_144
MAX_PUBLISH_BLOCKS = 262_144
MAX_WORKER_ID_CHARS = 256


class IndexService:
    """Validates, measures, and passes on. Holds nothing that another replica would need."""

    def __init__(self, store: BlockStore, slots: Slots, matcher: Matcher, metrics: IndexMetrics) -> None:
        self._store = store
        self._slots = slots
        self._matcher = matcher
        self._metrics = metrics

    def add_to(self, server: RpcServer) -> None:
        server.add_unary(INDEX_SERVICE, "Attach", attach, attached, self.on_attach)
        server.add_unary(INDEX_SERVICE, "Publish", publish, published, self.on_publish)
        server.add_unary(INDEX_SERVICE, "Match", match, matched, self.on_match)

    async def on_attach(self, message: Attach) -> Attached:
        with self._measured("Attach"):
            _check_worker_id(message.worker.worker_id)
            return Attached(await self._slots.attach(message.worker))

    async def on_publish(self, message: Publish) -> Published:
        with self._measured("Publish"):
            _check_worker_id(message.worker.worker_id)
            _check_slot(message.slot)
            _check_seq(message.seq)
            _check_hashes(message.removed, MAX_PUBLISH_BLOCKS - len(message.stored), "removed")
            _check_hashes(message.stored, MAX_PUBLISH_BLOCKS, "stored")
            await self._store.publish(message)
        self._metrics.published_blocks.labels("stored").inc(len(message.stored))
        self._metrics.published_blocks.labels("removed").inc(len(message.removed))
        return Published(message.seq)

    async def on_match(self, message: Match) -> Matched:
        with self._measured("Match"):
            _check_hashes(message.block_hashes, MAX_MATCH_BLOCKS, "block_hashes")
            holders = await self._matcher.match(message.block_hashes)
        self._metrics.asked_blocks.inc(len(message.block_hashes))
        self._metrics.matched_blocks.inc(holders[0].num_blocks if holders else 0)
        return Matched(holders)

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
    if any(len(block_hash) != HASH_BYTES for block_hash in block_hashes):
        raise invalid_request(f"a block hash has {HASH_BYTES} bytes", param=param)
