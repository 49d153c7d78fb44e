"""The blocks in Redis: one bitmap over slots per block."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import msgspec

from phloem.services.cache_index import layout
from phloem.shared.discovery.redis_link import Argument, RedisLink
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.index import Publish, Verify
from phloem.shared.protocol.session import PeerRef
from phloem.shared.tree_digest import digest_text

# One script call blocks Redis for a microsecond or two per block. A lookup waits for those sent before it, so
# they are short, and few are under way at once, however many workers publish.
BLOCKS_PER_SCRIPT = 64
_PARALLEL_WRITES = 2
# Unpacking a batch keeps look-ups in this process waiting, for about a microsecond per key.
KEYS_PER_SCAN = 128


class Blocks(msgspec.Struct, frozen=True):
    """Bitmaps over slots and announced workers, in the order asked for, and the version of the slot table
    that the bitmaps belong to."""

    version: bytes | None
    bitmaps: list[int]
    announced: list[PeerRef | None] = []


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

    async def read(self, block_hashes: Sequence[bytes], landmarks: Sequence[bytes] = ()) -> Blocks:
        """The blocks, whom the landmarks were announced for, and the slot table's version, of one instant."""
        names: list[Argument] = [
            layout.VERSION,
            *layout.block_keys(block_hashes),
            *map(layout.announcement_key, landmarks),
        ]
        reply = await self._link.command("MGET", *names, timeout_s=self._read_timeout_s)
        end = 1 + len(block_hashes)
        announced = [None if value is None else layout.worker_of(value.decode()) for value in reply[end:]]
        return Blocks(reply[0], layout.bitmaps(reply[1:end]), announced)

    async def announce(self, placements: Iterable[tuple[bytes, PeerRef]], ttl_s: float) -> None:
        """Notes for each block the worker that is about to compute it; the last word counts."""
        ttl_ms = max(1, round(ttl_s * 1000))
        await self._link.pipeline(
            [
                ("SET", layout.announcement_key(block), layout.owner(worker), "PX", ttl_ms)
                for block, worker in placements
            ],
            self._write_timeout_s,
        )

    async def publish(self, message: Publish) -> None:
        """Applies one message in parts of bounded size; each part checks that the slot is still the worker's.

        A message that was cut short can be sent again whole, and so can one that was applied. Raises
        `PhloemError` `resync_needed` (retryable) on a gap, or when the slot is not the worker's.
        """
        owner = layout.owner(message.worker)
        for removed, stored, is_last in _parts(message):
            names = _slot_keys((*removed, *stored))
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
                raise _resync_needed(
                    message.worker, f"slot {message.slot} does not continue with {message.seq}"
                )

    async def verify(self, message: Verify) -> None:
        """Compares what the slot holds with what its worker published.

        Raises `PhloemError` `resync_needed` (retryable) when they differ, or the slot is not the worker's.
        """
        args = (
            message.slot,
            layout.owner(message.worker),
            message.seq,
            digest_text(message.num_blocks, message.digest),
            layout.bit_offset(message.slot),
        )
        async with self._writes:
            names = _slot_keys(message.sample)
            equal = await self._link.script(layout.VERIFY, names, args, self._write_timeout_s)
        if not equal:
            raise _resync_needed(message.worker, f"slot {message.slot} does not hold what was published")

    async def scan(self, cursor: int) -> ScanBatch:
        """The next batch of a walk over all blocks, from cursor 0. A block that exists during the whole walk
        is met at least once."""
        reply = await self._link.command(
            "SCAN", cursor, "MATCH", layout.BLOCK_PATTERN, "COUNT", KEYS_PER_SCAN, "TYPE", "string"
        )
        names: list[bytes] = reply[1]
        values = await self._link.command("MGET", *names) if names else []
        return ScanBatch(int(reply[0]), dict(zip(names, layout.bitmaps(values), strict=True)))

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


def _slot_keys(block_hashes: Sequence[bytes]) -> list[Argument]:
    return [layout.SLOTS, layout.SEQ, layout.DIGESTS, *layout.block_keys(block_hashes)]


def _resync_needed(worker: PeerRef, reason: str) -> PhloemError:
    return PhloemError(
        "resync_needed",
        f"{reason} (worker {worker.worker_id}, epoch {worker.epoch}): attach anew and publish the whole tree",
        retryable=True,
        http_status=409,
    )
