"""Answers lookups: reads blocks, and names the live workers behind their bits."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from phloem.services.cache_index.chain_reader import ChainReader
from phloem.services.cache_index.match import matching
from phloem.services.cache_index.metrics import IndexMetrics
from phloem.services.cache_index.near_cache import NearCache
from phloem.services.cache_index.slots import Slots, SlotTable
from phloem.services.cache_index.store import BlockStore
from phloem.shared.discovery.snapshot import ClusterSnapshot
from phloem.shared.errors import PhloemError, unavailable
from phloem.shared.protocol.index import Holder, Matched
from phloem.shared.protocol.session import PeerRef

# After a failed read, lookups fail at once for this long instead of each waiting for its deadline.
_BREAK_S = 0.25
_MAX_ATTEMPTS = 4


class _View(NamedTuple):
    """A slot table, and the bits of its slots whose workers live."""

    table: SlotTable
    live_mask: int


class Matcher:
    """Keeps the slot table that the last lookup saw, hot blocks that belong to it, and which workers live.

    Every read brings the slot table's version with it, so an answer never mixes blocks of one table with
    workers of another: a bit can't be taken for that of its slot's next holder.
    """

    def __init__(
        self, store: BlockStore, slots: Slots, near: NearCache, metrics: IndexMetrics, *, timeout_s: float
    ) -> None:
        self._store = store
        self._slots = slots
        self._near = near
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._live: frozenset[PeerRef] = frozenset()
        self._redis_ok = False
        self._broken_until = 0.0
        self._view = _View(SlotTable(None, {}), 0)

    def set_snapshot(self, snapshot: ClusterSnapshot) -> None:
        """Who lives; called with every snapshot of the registry."""
        self._redis_ok = snapshot.redis_ok
        self._live = frozenset(PeerRef(worker.worker_id, worker.epoch) for worker in snapshot.workers)
        self._view = self._view_of(self._view.table)

    async def match(self, block_hashes: Sequence[bytes]) -> Matched:
        """The live workers that hold leading blocks of the chain, longest first, and those for which such
        blocks were announced.

        Raises `PhloemError` (retryable) when Redis is away (`redis_unavailable`), or the slot table keeps
        changing (`index_busy`).
        """
        if not self._redis_ok or time.monotonic() < self._broken_until:
            raise unavailable("the index can't reach Redis", code="redis_unavailable")
        try:
            for _ in range(_MAX_ATTEMPTS):
                matched = await self._match_under(self._view, block_hashes)
                if matched is not None:
                    return matched
                self._view = self._view_of(await self._slots.table(self._timeout_s))
                self._near.turn_to(self._view.table.version)
        except PhloemError:
            self._broken_until = time.monotonic() + _BREAK_S
            raise
        raise unavailable("the slot table of the index changes too fast", code="index_busy")

    async def _match_under(self, view: _View, block_hashes: Sequence[bytes]) -> Matched | None:
        """None when the view's table is outdated."""
        reader = ChainReader(self._store, self._near, block_hashes, view.table.version)
        lengths = await _lengths(reader, len(block_hashes), view.live_mask)
        self._metrics.read_blocks.labels("near").inc(reader.num_near)
        self._metrics.read_blocks.labels("redis").inc(reader.num_read)
        if lengths is None:
            return None
        held = {view.table.workers[slot]: length for slot, length in lengths.items()}
        announced = {worker: k for worker, k in reader.announced.items() if worker in self._live}
        return Matched(_holders(held), _holders(announced))

    def _view_of(self, table: SlotTable) -> _View:
        return _View(table, table.mask(self._live))


async def _lengths(reader: ChainReader, num_blocks: int, live_mask: int) -> dict[int, int] | None:
    """Slot -> blocks held; None when the slot table is outdated."""
    if not live_mask:
        return None if await reader.read(()) is None else {}
    steps = matching(num_blocks, live_mask)
    try:
        wanted = next(steps)
        while True:
            bitmaps = await reader.read(wanted)
            if bitmaps is None:
                return None
            wanted = steps.send(bitmaps)
    except StopIteration as done:
        lengths: dict[int, int] = done.value
    return lengths


def _holders(lengths: Mapping[PeerRef, int]) -> list[Holder]:
    """Longest first."""
    ordered = sorted(lengths.items(), key=lambda item: (-item[1], item[0].worker_id, item[0].epoch))
    return [Holder(worker, length) for worker, length in ordered]
