"""Reads blocks of one chain, from the near cache where it knows them and from Redis where it doesn't."""

from __future__ import annotations

import time
from collections.abc import Sequence

from phloem.services.cache_index.near_cache import NearCache
from phloem.services.cache_index.store import BlockStore
from phloem.shared.block_hash import landmarks
from phloem.shared.protocol.session import PeerRef


class ChainReader:
    """For one lookup under one version of the slot table.

    The first read that goes to Redis brings the announcements along. A chain that the near cache knows to its
    end needs none: somebody holds it.
    """

    def __init__(
        self, store: BlockStore, near: NearCache, chain: Sequence[bytes], version: bytes | None
    ) -> None:
        self._store = store
        self._near = near
        self._chain = chain
        self._version = version
        self._has_asked = False
        self.announced: dict[PeerRef, int] = {}
        self.num_near = 0
        self.num_read = 0

    async def read(self, indices: Sequence[int]) -> list[int] | None:
        """Bitmaps of these blocks, in this order; None when the slot table is another one by now. Reading no
        block asks Redis for just that."""
        wanted = [self._chain[index] for index in indices]
        known = self._near.known(wanted, self._version)
        self.num_near += len(known)
        missing = [block for block in wanted if block not in known] if known else wanted
        if missing or not wanted:
            bitmaps = await self._ask(missing)
            if bitmaps is None:
                return None
            if not known:
                return bitmaps
            known.update(zip(missing, bitmaps, strict=True))
        return [known[block] for block in wanted]

    async def _ask(self, blocks: Sequence[bytes]) -> list[int] | None:
        marks = [] if self._has_asked else landmarks(len(self._chain))
        self._has_asked = True
        self.num_read += len(blocks)
        asked_at = time.monotonic()
        reply = await self._store.read(blocks, [self._chain[index] for index in marks])
        if reply.version != self._version:
            return None
        for index, worker in zip(marks, reply.announced, strict=True):
            if worker is not None:
                self.announced[worker] = index + 1
        self._near.learn(blocks, reply.bitmaps, reply.version, asked_at)
        return reply.bitmaps
