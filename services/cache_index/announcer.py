"""Writes gateways' announcements to Redis, behind every call's back."""

from __future__ import annotations

import logging
from itertools import islice

from phloem.services.cache_index.metrics import IndexMetrics
from phloem.services.cache_index.store import BlockStore
from phloem.shared.batch_queue import BatchQueue
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.index import Announce

log = logging.getLogger(__name__)

MAX_WAITING = 1024
_BLOCKS_PER_WRITE = 512


class Announcer:
    """A bounded queue and its one writer. What does not fit, or can't be written, is dropped and counted: an
    announcement is worth nothing a moment later."""

    def __init__(self, store: BlockStore, metrics: IndexMetrics, *, ttl_s: float) -> None:
        self._store = store
        self._metrics = metrics
        self._ttl_s = ttl_s
        self._waiting: BatchQueue[Announce] = BatchQueue(MAX_WAITING)

    def announce(self, message: Announce) -> None:
        """Never waits."""
        if not self._waiting.offer(message):
            self._metrics.announcements.labels("dropped").inc()

    async def run(self) -> None:
        """Writes until cancelled."""
        while True:
            messages = await self._waiting.take_all()
            placements = {block: message.worker for message in messages for block in message.block_hashes}
            items = iter(placements.items())
            try:
                while batch := list(islice(items, _BLOCKS_PER_WRITE)):
                    await self._store.announce(batch, self._ttl_s)
            except PhloemError as error:
                self._metrics.announcements.labels("dropped").inc(len(messages))
                log.debug("announcements were not written: %s", error)
            else:
                self._metrics.announcements.labels("written").inc(len(messages))
