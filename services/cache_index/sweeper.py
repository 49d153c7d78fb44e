"""Takes slots from dead workers, clears their bits, and makes the slots leasable again.

Any number of replicas may sweep at once and any of them may stall: each step checks in Redis that its slot is
still in the same retirement. The lock only saves double work.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time

from phloem.services.cache_index.metrics import IndexMetrics
from phloem.services.cache_index.slots import Slots
from phloem.services.cache_index.store import BlockStore, ScanBatch
from phloem.shared.discovery.snapshot import ClusterSnapshot
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.session import PeerRef

log = logging.getLogger(__name__)

_LOCK_TTL_S = 10.0
# Between two batches of the walk, so that lookups are never stuck behind it.
_PAUSE_S = 0.001


class Sweeper:
    """Sweeps every `interval_s`; a worker must be lost for `grace_s` before its slot is taken."""

    def __init__(
        self, store: BlockStore, slots: Slots, metrics: IndexMetrics, *, interval_s: float, grace_s: float
    ) -> None:
        self._store = store
        self._slots = slots
        self._metrics = metrics
        self._interval_s = interval_s
        self._grace_s = grace_s
        self._token = secrets.token_hex(8)
        self._snapshot = ClusterSnapshot()
        self._lost_since: dict[tuple[int, PeerRef], float] = {}

    def set_snapshot(self, snapshot: ClusterSnapshot) -> None:
        """Who lives; called with every snapshot of the registry."""
        self._snapshot = snapshot

    async def run(self) -> None:
        """Sweeps until cancelled; while Redis is away it waits."""
        while True:
            try:
                await self.sweep()
            except PhloemError as error:
                log.info("the sweep is put off: %s", error)
            await asyncio.sleep(self._interval_s)

    async def sweep(self) -> int:
        """Retires the slots of workers that are dead for long enough and clears all retired ones. Returns how
        many slots it made free; 0 too while another replica sweeps."""
        if not self._snapshot.redis_ok:
            return 0
        await self._retire_dead()
        retired = await self._slots.retired()
        self._metrics.slots.labels("retired").set(len(retired))
        if not retired or not await self._store.lock_sweep(self._token, _LOCK_TTL_S):
            return 0
        try:
            return await self._clear(retired)
        finally:
            await self._store.unlock_sweep(self._token)

    async def _retire_dead(self) -> None:
        table = await self._slots.table()
        self._metrics.slots.labels("leased").set(len(table.workers))
        live = {PeerRef(worker.worker_id, worker.epoch) for worker in self._snapshot.workers}
        lost = {item for item in table.workers.items() if item[1] not in live}
        now = time.monotonic()
        self._lost_since = {item: self._lost_since.get(item, now) for item in lost}
        for (slot, worker), since in self._lost_since.items():
            if now - since >= self._grace_s and await self._slots.retire(slot, worker):
                self._metrics.retired_slots.inc()
                log.info(
                    "worker is dead, its slot is taken", extra={"worker": worker.worker_id, "slot": slot}
                )

    async def _clear(self, retired: dict[int, bytes]) -> int:
        """One walk over all blocks. No bit of a retired slot can be set any more, so what the walk has passed
        stays clear."""
        cursor = 0
        while True:
            batch = await self._store.scan(cursor)
            await self._clear_batch(batch, retired)
            cursor = batch.cursor
            if cursor == 0:
                break
            await self._store.lock_sweep(self._token, _LOCK_TTL_S)
            await asyncio.sleep(_PAUSE_S)
        num_freed = 0
        for slot, stamp in retired.items():
            num_freed += await self._slots.free(slot, stamp)
        self._metrics.swept_slots.inc(num_freed)
        return num_freed

    async def _clear_batch(self, batch: ScanBatch, retired: dict[int, bytes]) -> None:
        mask = sum(1 << slot for slot in retired)
        stale = [item for item in batch.bitmaps.items() if item[1] & mask]
        for slot, stamp in retired.items():
            names = [name for name, bitmap in stale if bitmap >> slot & 1]
            if names:
                await self._store.clear(slot, stamp, names)
