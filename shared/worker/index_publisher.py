"""Tells cache_index, in order, what this worker's radix tree stored and removed.

Serving never depends on it. When an index replica is lost, refuses a sequence number, or this worker fell too
far behind, the worker attaches anew and publishes its whole tree.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from phloem.shared.errors import PhloemError, unavailable
from phloem.shared.protocol.index import (
    INDEX_SERVICE,
    Attach,
    Publish,
    attach,
    attached,
    publish,
    published,
)
from phloem.shared.protocol.session import PeerRef
from phloem.shared.rpc.client import RpcChannel
from phloem.shared.worker.metrics import WorkerMetrics
from phloem.shared.worker.pending_changes import PendingChanges

log = logging.getLogger(__name__)

MAX_PENDING_BLOCKS = 65_536
BLOCKS_PER_PUBLISH = 4_096
RPC_TIMEOUT_S = 5.0
DUMP_TIMEOUT_S = 30.0
MIN_BACKOFF_S = 0.1
MAX_BACKOFF_S = 2.0


class IndexPublisher:
    """Owns the changes between the engine's reports and the index.

    `request_dump` asks the engine for its tree; the answer comes to `on_tree_dump`, in order with the
    reports that come to `note`.
    """

    def __init__(
        self,
        worker: PeerRef,
        cluster_secret: bytes,
        request_dump: Callable[[], None],
        metrics: WorkerMetrics,
    ) -> None:
        self._worker = worker
        self._cluster_secret = cluster_secret
        self._request_dump = request_dump
        self._metrics = metrics
        self._pending = PendingChanges(MAX_PENDING_BLOCKS)
        self._addresses: tuple[str, ...] = ()
        self._num_failures = 0
        self._dumped = False  # the pending changes continue what the index was or will be told
        self._resync = False
        self._changed = asyncio.Event()

    def set_addresses(self, addresses: Sequence[str]) -> None:
        """The index replicas that live now."""
        if tuple(addresses) != self._addresses:
            self._addresses = tuple(addresses)
            self._changed.set()

    def note(self, stored: Sequence[bytes], removed: Sequence[bytes]) -> None:
        """One engine step's changes."""
        if self._dumped and (stored or removed):
            self._pending.note(stored, removed)
            self._changed.set()

    def on_tree_dump(self, blocks: Sequence[bytes]) -> None:
        """All blocks that the tree holds now; `note` continues from here."""
        self._pending.replace(blocks)
        self._dumped = True
        self._changed.set()

    def resync(self) -> None:
        """The index may have lost what it was told: publish everything again."""
        self._resync = True
        self._changed.set()

    async def run(self) -> None:
        """Publishes until cancelled; never raises for the index."""
        while True:
            await self._until(lambda: bool(self._addresses))
            address = self._addresses[self._num_failures % len(self._addresses)]
            channel = RpcChannel(address, self._cluster_secret)
            try:
                await self._publish_to(channel)
            except PhloemError as error:
                log.info("publishing to the index starts over: %s", error, extra={"index": address})
                self._num_failures += 1
            finally:
                self._dumped = False
                await channel.close()
            await asyncio.sleep(min(MAX_BACKOFF_S, MIN_BACKOFF_S * 2 ** min(self._num_failures, 5)))

    async def _publish_to(self, channel: RpcChannel) -> None:
        """Attaches, publishes the whole tree, then every change; returns when all must be done anew."""
        self._resync = False
        answer = await channel.unary(INDEX_SERVICE, "Attach", attach, attached)(
            Attach(self._worker), RPC_TIMEOUT_S
        )
        await self._load_tree()
        self._metrics.index_resyncs.inc()
        call = channel.unary(INDEX_SERVICE, "Publish", publish, published)
        seq = 0
        while await self._wait_for_changes(channel.address):
            stored, removed = self._pending.take(BLOCKS_PER_PUBLISH)
            seq += 1
            message = Publish(worker=self._worker, slot=answer.slot, seq=seq, stored=stored, removed=removed)
            await call(message, RPC_TIMEOUT_S)
            self._num_failures = 0
            self._metrics.index_blocks.labels("stored").inc(len(stored))
            self._metrics.index_blocks.labels("removed").inc(len(removed))

    async def _load_tree(self) -> None:
        self._request_dump()
        try:
            async with asyncio.timeout(DUMP_TIMEOUT_S):
                await self._until(lambda: self._dumped)
        except TimeoutError as error:
            raise unavailable("the engine did not send its tree in time", code="no_tree_dump") from error

    async def _wait_for_changes(self, address: str) -> bool:
        """True when there is something to publish; False when only a new start helps."""

        def broken() -> bool:
            return self._resync or self._pending.overflowed or address not in self._addresses

        await self._until(lambda: broken() or len(self._pending) > 0)
        return not broken()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()
