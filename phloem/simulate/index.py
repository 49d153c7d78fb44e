"""The cluster's prefix index as gateways see it: the real matching over bitmaps, a little behind."""

from __future__ import annotations

from collections.abc import Sequence

from phloem.services.cache_index.match import matching
from phloem.simulate.events import EventQueue


class SimIndex:
    """One bitmap of worker slots per block, and the last announced worker per block until it runs out, as in
    Redis. (A real announcement marks every 1,024 tokens or so; here it marks every block, mostly of 512.)"""

    def __init__(self, events: EventQueue, num_slots: int, publish_s: float, announce_ttl_s: float) -> None:
        self._events = events
        self._publish_s = publish_s
        self._announce_ttl_s = announce_ttl_s
        self._all_slots = (1 << num_slots) - 1
        self._bitmaps: dict[bytes, int] = {}
        self._announced: dict[bytes, tuple[int, float]] = {}  # slot, until when

    @property
    def num_blocks(self) -> int:
        return len(self._bitmaps)

    def publish(self, slot: int, stored: Sequence[bytes], removed: Sequence[bytes]) -> None:
        """What a worker's tree stored and removed just now; look-ups see it `publish_s` later."""
        if stored or removed:
            self._events.after(self._publish_s, lambda: self._apply(1 << slot, stored, removed))

    def match(self, block_hashes: Sequence[bytes]) -> dict[int, int]:
        """Leading blocks of the chain that each slot holds; slots that hold none are left out."""
        steps = matching(len(block_hashes), self._all_slots)
        bitmaps = self._bitmaps
        try:
            wanted = next(steps)
            while True:
                wanted = steps.send([bitmaps.get(block_hashes[i], 0) for i in wanted])
        except StopIteration as end:
            lengths: dict[int, int] = end.value
            return lengths

    def announce(self, slot: int, block_hashes: Sequence[bytes]) -> None:
        """A gateway just gave this chain to a worker; look-ups see it `publish_s` later."""
        if self._announce_ttl_s > 0:
            self._events.after(self._publish_s, lambda: self._mark(slot, block_hashes))

    def announced(self, block_hashes: Sequence[bytes]) -> dict[int, int]:
        """Leading blocks of the chain that were announced for each slot."""
        now_s = self._events.now_s
        found: dict[int, int] = {}
        for count, block in enumerate(block_hashes, start=1):
            slot, until_s = self._announced.get(block, (-1, 0.0))
            if until_s > now_s:
                found[slot] = count
        return found

    def _mark(self, slot: int, block_hashes: Sequence[bytes]) -> None:
        mark = (slot, self._events.now_s + self._announce_ttl_s)
        for block in block_hashes:
            self._announced[block] = mark

    def _apply(self, bit: int, stored: Sequence[bytes], removed: Sequence[bytes]) -> None:
        bitmaps = self._bitmaps
        for block in removed:
            left = bitmaps.get(block, 0) & ~bit
            if left:
                bitmaps[block] = left
            else:
                bitmaps.pop(block, None)
        for block in stored:
            bitmaps[block] = bitmaps.get(block, 0) | bit
