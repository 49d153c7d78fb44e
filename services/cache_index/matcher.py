"""Answers lookups: reads blocks, and names the live workers behind their bits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from phloem.services.cache_index.match import matching
from phloem.services.cache_index.slots import Slots, SlotTable
from phloem.services.cache_index.store import BlockStore
from phloem.shared.discovery.snapshot import ClusterSnapshot
from phloem.shared.errors import PhloemError, unavailable
from phloem.shared.protocol.index import Holder
from phloem.shared.protocol.session import PeerRef

# After a failed read, lookups fail at once for this long instead of each waiting for its deadline.
_BREAK_S = 0.25
_MAX_ATTEMPTS = 4


class _View(NamedTuple):
    """A slot table, and the bits of its slots whose workers live."""

    table: SlotTable
    live_mask: int


class Matcher:
    """Keeps the slot table that the last lookup saw, and which workers live.

    Every read brings the slot table's version with it, so an answer never mixes blocks of one table with
    workers of another: a bit can't be taken for that of its slot's next holder.
    """

    def __init__(self, store: BlockStore, slots: Slots, *, timeout_s: float) -> None:
        self._store = store
        self._slots = slots
        self._timeout_s = timeout_s
        self._live: frozenset[PeerRef] = frozenset()
        self._redis_ok = False
        self._broken_until = 0.0
        self._view = _View(SlotTable(None, {}), 0)

    def set_snapshot(self, snapshot: ClusterSnapshot) -> None:
        """Who lives; called with every snapshot of the registry."""
        self._redis_ok = snapshot.redis_ok
        self._live = frozenset(PeerRef(worker.worker_id, worker.epoch) for worker in snapshot.workers)
        self._set_table(self._view.table)

    async def match(self, block_hashes: Sequence[bytes]) -> list[Holder]:
        """The live workers that hold leading blocks of the chain, longest first.

        Raises `PhloemError` (retryable) when Redis is away (`redis_unavailable`), or the slot table keeps
        changing (`index_busy`).
        """
        if not self._redis_ok or time.monotonic() < self._broken_until:
            raise unavailable("the index can't reach Redis", code="redis_unavailable")
        try:
            for _ in range(_MAX_ATTEMPTS):
                view = self._view
                lengths = await self._lengths(block_hashes, view)
                if lengths is not None:
                    return _holders(lengths, view.table)
                self._set_table(await self._slots.table(self._timeout_s))
        except PhloemError:
            self._broken_until = time.monotonic() + _BREAK_S
            raise
        raise unavailable("the slot table of the index changes too fast", code="index_busy")

    async def _lengths(self, block_hashes: Sequence[bytes], view: _View) -> dict[int, int] | None:
        """Slot -> blocks held; None when the view's table is outdated."""
        if not view.live_mask:
            blocks = await self._store.read(())
            return {} if blocks.version == view.table.version else None
        steps = matching(len(block_hashes), view.live_mask)
        try:
            wanted = next(steps)
            while True:
                blocks = await self._store.read([block_hashes[index] for index in wanted])
                if blocks.version != view.table.version:
                    return None
                wanted = steps.send(blocks.bitmaps)
        except StopIteration as done:
            lengths: dict[int, int] = done.value
        return lengths

    def _set_table(self, table: SlotTable) -> None:
        self._view = _View(table, table.mask(self._live))


def _holders(lengths: dict[int, int], table: SlotTable) -> list[Holder]:
    ordered = sorted(lengths.items(), key=lambda item: (-item[1], item[0]))
    return [Holder(table.workers[slot], length) for slot, length in ordered]
