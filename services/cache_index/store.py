"""The blocks in Redis: one bitmap over slots per block."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from itertools import islice

import msgspec

from phloem.services.cache_index import layout
from phloem.shared.discovery.redis_link import Argument, RedisLink
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.index import Publish

# One script call blocks Redis for about a microsecond per block. A lookup waits for those sent before it, so
# they are short, and few are under way at once, however many workers publish.
BLOCKS_PER_SCRIPT = 256
_PARALLEL_WRITES = 2
KEYS_PER_SCAN = 512


class Blocks(msgspec.Struct, frozen=True):
    """Bitmaps over slots, in the order asked for, and the version of the slot table that they belong to."""

    version: bytes | None
    bitmaps: list[int]


class ScanBatch(msgspec.Struct, frozen=True):
    """Some of all blocks: key -> bitmap over slots. `cursor` is 0 after the last batch."""

    cursor: int
    bitmaps: dict[bytes, int]


class BlockStore:
    """Reads and changes blocks. Every method raises `PhloemError` `redis_unavailable` when Redis is away."""

    def __init__(self, link: RedisLink, *, read_timeout_s: float, write_timeout_s: float) -> None:
        self._link = link
        self._read_timeout_s = read_timeout_s
        self._write_timeout_s = write_timeout_s
        self._writes = asyncio.Semaphore(_PARALLEL_WRITES)

    async def read(self, block_hashes: Sequence[bytes]) -> Blocks:
        """The blocks and the slot table's version, all of one instant."""
        names: list[Argument] = [layout.VERSION, *map(layout.block_key, block_hashes)]
        reply = await self._link.command("MGET", *names, timeout_s=self._read_timeout_s)
        return Blocks(reply[0], [layout.bitmap(value) for value in reply[1:]])

    async def publish(self, message: Publish) -> None:
        """Applies one message in parts of bounded size; each part checks that the slot is still the worker's.

        A message that was cut short can be sent again whole, and so can one that was applied. Raises
        `PhloemError` `resync_needed` (retryable) on a gap, or when the slot is not the worker's.
        """
        owner = layout.owner(message.worker)
        for removed, stored, is_last in _parts(message):
            names: list[Argument] = [layout.SLOTS, layout.SEQ, *map(layout.block_key, (*removed, *stored))]
            args = (
                message.slot,
                owner,
                message.seq,
                layout.bit_offset(message.slot),
                len(removed),
                int(is_last),
            )
            # The caller's deadline bounds the wait; each worker waits with one message at a time.
            async with self._writes:
                applied = await self._link.script(layout.PUBLISH, names, args, self._write_timeout_s)
            if not applied:
                raise _resync_needed(message)

    async def scan(self, cursor: int) -> ScanBatch:
        """The next batch of a walk over all blocks, from cursor 0. A block that exists during the whole walk
        is met at least once."""
        reply = await self._link.command(
            "SCAN", cursor, "MATCH", layout.BLOCK_PATTERN, "COUNT", KEYS_PER_SCAN, "TYPE", "string"
        )
        names: list[bytes] = reply[1]
        values = await self._link.command("MGET", *names) if names else []
        bitmaps = {name: layout.bitmap(value) for name, value in zip(names, values, strict=True)}
        return ScanBatch(int(reply[0]), bitmaps)

    async def clear(self, slot: int, stamp: bytes, names: Sequence[bytes]) -> bool:
        """Clears a retired slot's bit in these keys; deletes those that nobody holds any more. False when the
        retirement with this stamp is over."""
        args = (slot, stamp, layout.bit_offset(slot))
        return bool(await self._link.script(layout.CLEAR, (layout.RETIRED, *names), args))

    async def lock_sweep(self, token: str, ttl_s: float) -> bool:
        """Takes or keeps the right to sweep; it only saves work, nothing relies on it."""
        args = (token, round(ttl_s * 1000))
        return bool(await self._link.script(layout.LOCK, (layout.SWEEPER,), args))

    async def unlock_sweep(self, token: str) -> None:
        await self._link.script(layout.UNLOCK, (layout.SWEEPER,), (token,))


def _parts(message: Publish) -> Iterator[tuple[list[bytes], list[bytes], bool]]:
    """(removed, stored, is last): at most BLOCKS_PER_SCRIPT blocks each, in order, removals first."""
    removed, stored = iter(message.removed), iter(message.stored)
    left = len(message.removed) + len(message.stored)
    while True:
        some_removed = list(islice(removed, BLOCKS_PER_SCRIPT))
        some_stored = list(islice(stored, BLOCKS_PER_SCRIPT - len(some_removed)))
        left -= len(some_removed) + len(some_stored)
        yield some_removed, some_stored, left == 0
        if left == 0:
            return


def _resync_needed(message: Publish) -> PhloemError:
    return PhloemError(
        "resync_needed",
        f"slot {message.slot} does not continue with seq {message.seq} of worker {message.worker.worker_id} "
        f"at epoch {message.worker.epoch}: attach anew and publish the whole tree",
        retryable=True,
        http_status=409,
    )
