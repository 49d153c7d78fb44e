"""Slot leases: who gets one, who loses one, and when it may be given to the next."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from phloem.shared.discovery import keys
from phloem.shared.discovery.registry import Registry
from phloem.shared.discovery.snapshot import ClusterSnapshot
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.session import PeerRef
from tests.support.index_replica import IndexReplica
from tests.support.valkey import ValkeyServer
from tests.support.worker_records import record_of

A1, A2, B1 = PeerRef("a", 1), PeerRef("a", 2), PeerRef("b", 1)


@pytest.fixture
async def replica(valkey: ValkeyServer) -> AsyncIterator[IndexReplica]:
    replica = IndexReplica(valkey.url, max_slots=2)
    replica.observe(ClusterSnapshot(redis_ok=True))
    yield replica
    await replica.close()


async def test_workers_get_slots_of_their_own_lowest_first(replica: IndexReplica) -> None:
    assert [await replica.slots.attach(worker) for worker in (A1, B1)] == [0, 1]
    assert (await replica.slots.table()).workers == {0: A1, 1: B1}


async def test_attaching_again_retires_the_slot_before(replica: IndexReplica) -> None:
    assert [await replica.slots.attach(A1), await replica.slots.attach(A1)] == [0, 1]
    assert (await replica.slots.table()).workers == {1: A1}
    assert list(await replica.slots.retired()) == [0]


async def test_new_epoch_takes_the_old_ones_slot_away(replica: IndexReplica) -> None:
    await replica.slots.attach(A1)
    assert await replica.slots.attach(A2) == 1
    assert (await replica.slots.table()).workers == {1: A2}


async def test_old_epoch_gets_no_slot_after_a_newer_one(replica: IndexReplica) -> None:
    """Also when the fence of the registration is gone."""
    await replica.slots.attach(A2)
    with pytest.raises(PhloemError) as caught:
        await replica.slots.attach(A1)
    assert (caught.value.code, caught.value.retryable) == ("stale_epoch", False)
    assert (await replica.slots.table()).workers == {0: A2}


async def test_full_index_refuses_until_a_slot_is_swept(replica: IndexReplica) -> None:
    await replica.slots.attach(A1)
    await replica.slots.attach(B1)
    with pytest.raises(PhloemError) as caught:
        await replica.slots.attach(PeerRef("c", 1))
    assert (caught.value.code, caught.value.retryable) == ("index_full", True)
    assert await replica.sweeper.sweep() == 2
    assert await replica.slots.attach(PeerRef("c", 1)) == 0


async def test_live_workers_slot_is_not_taken_on_an_old_snapshot(
    replica: IndexReplica, registry: Registry
) -> None:
    """The sweeper saw the worker dead; it has registered since."""
    await registry.renew_worker(record_of(A1))
    await replica.slots.attach(A1)
    assert not await replica.slots.retire(0, A1)
    await registry.link.command("DEL", keys.lease(keys.worker_member("a")))
    assert await replica.slots.retire(0, A1)
    assert (await replica.slots.table()).workers == {}


async def test_slot_of_an_epoch_that_lives_no_more_is_taken(
    replica: IndexReplica, registry: Registry
) -> None:
    await replica.slots.attach(A1)
    await registry.renew_worker(record_of(A2))
    assert await replica.slots.retire(0, A1)


async def test_slot_is_not_taken_from_another_than_its_holder(replica: IndexReplica) -> None:
    await replica.slots.attach(A1)
    assert not await replica.slots.retire(0, B1)


async def test_mask_has_the_bits_of_live_workers_at_their_epoch(replica: IndexReplica) -> None:
    await replica.slots.attach(A1)
    await replica.slots.attach(B1)
    table = await replica.slots.table()
    assert table.mask([A1, B1]) == 0b11
    assert table.mask([A2, B1]) == 0b10
    assert table.mask([]) == 0


async def test_table_has_another_version_after_every_change(replica: IndexReplica) -> None:
    versions = [(await replica.slots.table()).version]
    await replica.slots.attach(A1)
    versions.append((await replica.slots.table()).version)
    await replica.slots.retire(0, A1)
    versions.append((await replica.slots.table()).version)
    assert len(set(versions)) == 3
