"""Forgetting dead workers: completely, only them, and safely with several sweepers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from phloem.services.cache_index import layout
from phloem.services.cache_index.store import KEYS_PER_SCAN, BlockStore, ScanBatch
from phloem.services.cache_index.sweeper import Sweeper
from phloem.shared.discovery import keys
from phloem.shared.discovery.registry import Registry
from phloem.shared.discovery.snapshot import ClusterSnapshot
from phloem.shared.protocol.index import Publish
from phloem.shared.protocol.session import PeerRef
from tests.support.index_replica import IndexReplica, some_chain
from tests.support.valkey import ValkeyServer
from tests.support.worker_records import record_of

DEAD, LIVE, NEXT = PeerRef("dead", 1), PeerRef("live", 1), PeerRef("next", 1)
ONLY_LIVE = ClusterSnapshot(workers=(record_of(LIVE),), redis_ok=True)
SHARED = some_chain("shared", 3 * KEYS_PER_SCAN)
OWN = some_chain("own", 3 * KEYS_PER_SCAN)


class StoreThatStalls(BlockStore):
    """Clears only once `go_on` is set; `stalled` says that it would have."""

    stalled: asyncio.Event
    go_on: asyncio.Event

    async def clear(self, slot: int, stamp: bytes, names: list[bytes] | tuple[bytes, ...]) -> bool:  # type: ignore[override]
        self.stalled.set()
        await self.go_on.wait()
        return await super().clear(slot, stamp, names)


@pytest.fixture
async def replica(valkey: ValkeyServer, registry: Registry) -> AsyncIterator[IndexReplica]:
    """A dead worker in slot 0 and a live one in slot 1 share blocks; the dead one has some alone."""
    replica = IndexReplica(valkey.url)
    for slot, worker in enumerate((DEAD, LIVE)):
        assert await replica.slots.attach(worker) == slot
    await replica.store.publish(Publish(worker=DEAD, slot=0, seq=1, stored=SHARED + OWN))
    await replica.store.publish(Publish(worker=LIVE, slot=1, seq=1, stored=SHARED))
    await registry.link.command("SET", keys.lease(keys.worker_member("live")), b"")
    await registry.link.command("SET", keys.fence(keys.worker_member("live")), LIVE.epoch)
    replica.observe(ONLY_LIVE)
    yield replica
    await replica.close()


async def all_bitmaps(store: BlockStore) -> dict[bytes, int]:
    found: dict[bytes, int] = {}
    batch = ScanBatch(0, {})
    while not found or batch.cursor:
        batch = await store.scan(batch.cursor)
        found |= batch.bitmaps
    return found


async def test_sweep_forgets_all_of_the_dead_and_nothing_of_the_living(replica: IndexReplica) -> None:
    assert await replica.sweeper.sweep() == 1
    assert await all_bitmaps(replica.store) == {layout.block_key(block): 0b10 for block in SHARED}
    assert await replica.lengths(SHARED) == {LIVE: len(SHARED)}
    assert await replica.slots.attach(NEXT) == 0


async def test_slot_is_not_leased_again_before_it_is_swept(replica: IndexReplica) -> None:
    await replica.slots.retire(0, DEAD)
    assert await replica.slots.attach(NEXT) == 2


async def test_worker_has_a_grace_to_come_back(valkey: ValkeyServer, replica: IndexReplica) -> None:
    patient = IndexReplica(valkey.url, grace_s=3600.0)
    patient.observe(ONLY_LIVE)
    assert await patient.sweeper.sweep() == 0
    assert (await patient.slots.table()).workers == {0: DEAD, 1: LIVE}
    await patient.close()


async def test_nothing_is_swept_while_it_is_unknown_who_lives(replica: IndexReplica) -> None:
    replica.observe(ClusterSnapshot(redis_ok=False))
    assert await replica.sweeper.sweep() == 0
    assert (await replica.slots.table()).workers == {0: DEAD, 1: LIVE}


async def test_only_one_replica_sweeps_at_a_time(valkey: ValkeyServer, replica: IndexReplica) -> None:
    assert await replica.store.lock_sweep("another replica", 60.0)
    assert await replica.sweeper.sweep() == 0
    await replica.store.unlock_sweep("another replica")
    assert await replica.sweeper.sweep() == 1


async def test_sweeper_that_stalled_never_clears_the_slots_next_holder(
    valkey: ValkeyServer, replica: IndexReplica
) -> None:
    """It lost its lock meanwhile; another one finished, and the slot was leased and filled anew."""
    store = StoreThatStalls(replica.link, read_timeout_s=5.0, write_timeout_s=5.0)
    store.stalled, store.go_on = asyncio.Event(), asyncio.Event()
    stalled = Sweeper(store, replica.slots, replica.metrics, interval_s=60.0, grace_s=0.0)
    stalled.set_snapshot(ONLY_LIVE)
    sweeping = asyncio.create_task(stalled.sweep())
    async with asyncio.timeout(10):
        await store.stalled.wait()
    await replica.link.command("DEL", layout.SWEEPER)
    assert await replica.sweeper.sweep() == 1
    assert await replica.slots.attach(NEXT) == 0
    await replica.store.publish(Publish(worker=NEXT, slot=0, seq=1, stored=SHARED + OWN))
    store.go_on.set()
    async with asyncio.timeout(10):
        assert await sweeping == 0
    replica.observe(ClusterSnapshot(workers=(record_of(LIVE), record_of(NEXT)), redis_ok=True))
    assert await replica.lengths(OWN) == {NEXT: len(OWN)}
    assert (await replica.slots.table()).workers == {0: NEXT, 1: LIVE}


async def test_blocks_published_during_the_walk_stay(replica: IndexReplica) -> None:
    new = some_chain("new", KEYS_PER_SCAN)

    async def publish_slowly() -> None:
        for seq, start in enumerate(range(0, len(new), 16), start=2):
            message = Publish(worker=LIVE, slot=1, seq=seq, stored=new[start : start + 16])
            await replica.store.publish(message)

    freed, _ = await asyncio.gather(replica.sweeper.sweep(), publish_slowly())
    assert freed == 1
    assert await replica.lengths(new) == {LIVE: len(new)}
