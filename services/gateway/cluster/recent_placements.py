"""What this gateway sent where a moment ago: the cache index can't know it yet, and a burst of equal prompts
must land together."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from phloem.shared.block_hash import BLOCK_TOKENS
from phloem.shared.protocol.session import PeerRef

MAX_BLOCKS = 65_536
TTL_S = 10.0


class RecentPlacements:
    """The last worker that was given each block to compute, for a short time; bounded, oldest out first."""

    def __init__(
        self, clock: Callable[[], float], *, max_blocks: int = MAX_BLOCKS, ttl_s: float = TTL_S
    ) -> None:
        self._clock = clock
        self._max_blocks = max_blocks
        self._ttl_s = ttl_s
        self._placed: OrderedDict[bytes, tuple[PeerRef, float]] = OrderedDict()

    def note(self, block_hashes: Sequence[bytes], worker: PeerRef) -> None:
        """`worker` computes these blocks now."""
        expires_at = self._clock() + self._ttl_s
        for block in block_hashes:
            self._placed[block] = (worker, expires_at)
            self._placed.move_to_end(block)
        while len(self._placed) > self._max_blocks:
            self._placed.popitem(last=False)

    def cached_tokens(self, block_hashes: Sequence[bytes]) -> dict[PeerRef, int]:
        """Leading tokens that one worker will soon hold; a chain's blocks went to a worker from the first on,
        so its last known block decides."""
        now = self._clock()
        for count in range(len(block_hashes), 0, -1):
            worker, expires_at = self._placed.get(block_hashes[count - 1], (None, 0.0))
            if worker is not None and expires_at > now:
                return {worker: count * BLOCK_TOKENS}
        return {}
