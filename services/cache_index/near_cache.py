"""Hot blocks, kept in the replica for a moment.

What is answered from here was true in Redis at most `ttl_s` ago; see docs/adr/0020-near-cache.md for why
that is all that can be wrong with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

# A block is hot when it was read twice within this time.
_HOT_WINDOW_S = 1.0


class NearCache:
    """Bitmaps of blocks that were read again and again; at most `max_blocks`, each for `ttl_s` (0: nothing).

    Blocks that nobody holds are never kept: the next one to hold them is to be found at once. All bitmaps
    belong to one slot table, `version`. Look-ups run side by side, and the answer to one of them may be about
    an older table than another has seen meanwhile: whoever reads or teaches says which table it means.
    """

    def __init__(self, *, max_blocks: int, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_blocks = max_blocks
        self._ttl_s = ttl_s
        self._clock = clock
        self.version: bytes | None = None
        self._kept: dict[bytes, tuple[int, float]] = {}  # bitmap, expiry; the next to expire first
        self._seen: set[bytes] = set()
        self._seen_since = clock()

    def __len__(self) -> int:
        return len(self._kept)

    def known(self, block_hashes: Iterable[bytes], version: bytes | None) -> dict[bytes, int]:
        """The bitmaps under this slot table of those that are kept and fresh."""
        if not self._kept or version != self.version:
            return {}
        now = self._clock()
        kept = self._kept
        found = {block: kept[block] for block in block_hashes if block in kept}
        return {block: bitmap for block, (bitmap, expires_at) in found.items() if expires_at > now}

    def learn(
        self, block_hashes: Sequence[bytes], bitmaps: Sequence[int], version: bytes | None, asked_at: float
    ) -> None:
        """Blocks as Redis held them, under this slot table, at some time after `asked_at` (of this cache's
        clock)."""
        if self._ttl_s <= 0.0 or version != self.version:
            return
        self._forget_old()
        hot = self._seen.intersection(block_hashes)
        self._seen.update(block_hashes)
        if not hot:
            return
        expires_at = asked_at + self._ttl_s
        for block, bitmap in zip(block_hashes, bitmaps, strict=True):
            if block in hot:
                self._kept.pop(block, None)
                if bitmap:
                    self._kept[block] = (bitmap, expires_at)
        while len(self._kept) > self._max_blocks:
            del self._kept[next(iter(self._kept))]

    def forget(self, block_hashes: Iterable[bytes]) -> None:
        """These have just changed."""
        if self._kept:
            for block in block_hashes:
                self._kept.pop(block, None)

    def turn_to(self, version: bytes | None) -> None:
        """The slot table is this one now; what was kept of another is forgotten."""
        if version != self.version:
            self.version = version
            self._kept.clear()

    def _forget_old(self) -> None:
        now = self._clock()
        if now - self._seen_since > _HOT_WINDOW_S or len(self._seen) > self._max_blocks:
            self._seen.clear()
            self._seen_since = now
        while self._kept:
            block, (_, expires_at) = next(iter(self._kept.items()))
            if expires_at > now:
                return
            del self._kept[block]
