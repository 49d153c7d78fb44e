"""Tells cache_index, in order, what this worker's radix tree stored and removed.

Serving never depends on it. Slot and sequence number are the index's, not a replica's: when a replica is
lost, another one is told what comes next. When the index refuses a sequence number, has lost or changed what
it was told (every few seconds a digest is compared), or this worker fell too far behind, the worker attaches
anew and publishes its whole tree.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence

from phloem.shared.errors import PhloemError, unavailable
from phloem.shared.protocol.index import (
    INDEX_SERVICE,
    Attach,
    Publish,
    Verify,
    attach,
    attached,
    publish,
    published,
    verified,
    verify,
)
from phloem.shared.protocol.session import PeerRef
from phloem.shared.rpc.client import RpcChannel
from phloem.shared.worker.metrics import WorkerMetrics
from phloem.shared.worker.pending_changes import PendingChanges
from phloem.shared.worker.published_tree import PublishedTree

log = logging.getLogger(__name__)

MAX_PENDING_BLOCKS = 65_536
BLOCKS_PER_PUBLISH = 4_096
BLOCKS_PER_SAMPLE = 256
VERIFY_INTERVAL_S = 5.0
# Steps within this time share a message: a replica's time goes by messages, and until the index knows of a
# block its announcement leads to it.
PUBLISH_INTERVAL_S = 0.1
RPC_TIMEOUT_S = 5.0
DUMP_TIMEOUT_S = 30.0
MIN_BACKOFF_S = 0.1
MAX_BACKOFF_S = 1.0
# The replica, or the way to it, failed: what was sent may or may not have been applied, and is sent again.
_REPLICA_LOST = frozenset({"peer_unavailable", "deadline_exceeded", "redis_unavailable"})


class IndexPublisher:
    """Owns the changes between the engine's reports and the index.

    `request_dump` asks the engine for its tree; the answer comes to `on_tree_dump`, in order with the
    reports that come to `note`. `verify_interval_s` is the mean time between two comparisons of digests.
    """

    def __init__(
        self,
        worker: PeerRef,
        cluster_secret: bytes,
        request_dump: Callable[[], None],
        metrics: WorkerMetrics,
        *,
        verify_interval_s: float = VERIFY_INTERVAL_S,
    ) -> None:
        self._worker = worker
        self._cluster_secret = cluster_secret
        self._request_dump = request_dump
        self._metrics = metrics
        self._verify_interval_s = verify_interval_s
        self._pending = PendingChanges(MAX_PENDING_BLOCKS)
        self._published = PublishedTree()
        self._addresses: tuple[str, ...] = ()
        self._num_failures = 0
        self._slot: int | None = None  # None: attach, and publish the whole tree
        self._seq = 0  # of the last message that was confirmed
        self._unconfirmed: Publish | None = None
        self._verify_at = 0.0
        self._publish_at = 0.0
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
        """All blocks that the tree holds now; `note` continues from here.

        One that nobody waits for any more is ignored: what was noted since the one before it says the same,
        and also what is to be removed.
        """
        if self._dumped:
            return
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
                level = logging.DEBUG if self._num_failures else logging.INFO  # said once, not every second
                log.log(level, "publishing to the index is interrupted: %s", error, extra={"index": address})
                self._num_failures += 1
                if error.code not in _REPLICA_LOST:
                    self._forget_slot()
            finally:
                await channel.close()
            await asyncio.sleep(self._backoff_s())

    async def _publish_to(self, channel: RpcChannel) -> None:
        """Publishes every change, after the whole tree where that is needed; returns when another replica has
        to be asked."""
        while channel.address in self._addresses:
            if self._resync or self._pending.overflowed:
                self._forget_slot()
            if self._slot is None:
                await self._attach(channel)
            elif self._unconfirmed is None and time.monotonic() >= self._verify_at:
                await self._verify(channel)
            elif self._has_news() and time.monotonic() >= self._publish_at:
                await self._publish(channel)
            else:
                await self._wait_for_work(channel.address)

    def _forget_slot(self) -> None:
        """Nothing that the index was told counts any more; changes are noted again from the next dump on."""
        self._slot = None
        self._dumped = False

    async def _attach(self, channel: RpcChannel) -> None:
        """Gets an empty slot, and the whole tree from the engine."""
        self._resync = False
        call = channel.unary(INDEX_SERVICE, "Attach", attach, attached)
        slot = (await call(Attach(self._worker), RPC_TIMEOUT_S)).slot
        await self._load_tree()
        self._slot, self._seq, self._unconfirmed = slot, 0, None
        self._published = PublishedTree()
        self._verify_at = self._next_verification()
        self._metrics.index_resyncs.inc()

    async def _load_tree(self) -> None:
        self._request_dump()
        try:
            async with asyncio.timeout(DUMP_TIMEOUT_S):
                await self._until(lambda: self._dumped)
        except TimeoutError as error:
            raise unavailable("the engine did not send its tree in time", code="no_tree_dump") from error

    async def _publish(self, channel: RpcChannel) -> None:
        """One message; it is kept until it is confirmed, since its sequence number names exactly it."""
        message = self._unconfirmed or self._next_message()
        self._unconfirmed = message
        call = channel.unary(INDEX_SERVICE, "Publish", publish, published)
        await call(message, RPC_TIMEOUT_S)
        self._unconfirmed = None
        if len(self._pending) < BLOCKS_PER_PUBLISH:
            self._publish_at = time.monotonic() + PUBLISH_INTERVAL_S
        self._seq = message.seq
        self._num_failures = 0
        self._published.apply(message.stored, message.removed)
        self._metrics.index_blocks.labels("stored").inc(len(message.stored))
        self._metrics.index_blocks.labels("removed").inc(len(message.removed))

    def _has_news(self) -> bool:
        return self._unconfirmed is not None or len(self._pending) > 0

    def _next_message(self) -> Publish:
        assert self._slot is not None
        stored, removed = self._pending.take(BLOCKS_PER_PUBLISH)
        return Publish(
            worker=self._worker, slot=self._slot, seq=self._seq + 1, stored=stored, removed=removed
        )

    async def _verify(self, channel: RpcChannel) -> None:
        """Compares digests. Nobody else writes to the slot, nothing is under way: they must be equal."""
        assert self._slot is not None
        self._verify_at = self._next_verification()  # also when it fails: publishing must go on
        digest = self._published.digest
        message = Verify(
            worker=self._worker,
            slot=self._slot,
            seq=self._seq,
            num_blocks=digest.num_blocks,
            digest=digest.value,
            sample=self._published.sample(BLOCKS_PER_SAMPLE),
        )
        result = "failed"
        try:
            await channel.unary(INDEX_SERVICE, "Verify", verify, verified)(message, RPC_TIMEOUT_S)
            result = "equal"
        except PhloemError as error:
            result = "different" if error.code == "resync_needed" else "failed"
            raise
        finally:
            self._metrics.index_digests.labels(result).inc()

    def _next_verification(self) -> float:
        """Workers that started together don't all ask at once."""
        return time.monotonic() + random.uniform(0.5, 1.5) * self._verify_interval_s

    async def _wait_for_work(self, address: str) -> None:
        """Until there is something to publish or to verify, or the replica has left."""

        def must_act() -> bool:
            return self._resync or self._pending.overflowed or address not in self._addresses

        try:
            if not self._has_news():
                async with asyncio.timeout(_seconds_to(self._verify_at)):
                    await self._until(lambda: must_act() or self._has_news())
            async with asyncio.timeout(_seconds_to(self._publish_at)):
                await self._until(must_act)
        except TimeoutError:
            return

    def _backoff_s(self) -> float:
        if self._num_failures == 0:
            return 0.0
        return min(MAX_BACKOFF_S, MIN_BACKOFF_S * 2.0 ** min(self._num_failures - 1, 5))

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()


def _seconds_to(moment: float) -> float:
    return max(0.0, moment - time.monotonic())
