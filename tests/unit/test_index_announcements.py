"""Routing decisions that gateways tell each other through the index."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phloem.services.cache_index import layout
from phloem.services.cache_index.announcer import MAX_WAITING
from phloem.shared.block_hash import LANDMARK_STRIDE, landmarks
from phloem.shared.discovery.snapshot import ClusterSnapshot
from phloem.shared.protocol.index import Announce, Match, Publish
from phloem.shared.protocol.session import PeerRef
from tests.support.index_replica import IndexReplica, some_chain
from tests.support.valkey import ValkeyServer
from tests.support.waiting import until, until_async
from tests.support.worker_records import record_of

A, B, DEAD = PeerRef("a", 1), PeerRef("b", 1), PeerRef("dead", 1)
CHAIN = some_chain("prompt", 100)


@given(st.integers(0, 5000), st.integers(0, 5000))
def test_shared_prefix_is_found_to_within_a_stride(length: int, shared: int) -> None:
    """What was announced for a chain is found under another one that shares `shared` blocks with it."""
    shared = min(shared, length)
    marks = landmarks(length)
    assert marks == sorted(set(marks))
    assert not marks or marks[-1] == length - 1
    deepest = max((mark + 1 for mark in marks if mark < shared), default=0)
    assert shared - deepest < LANDMARK_STRIDE
    assert len(marks) <= length / LANDMARK_STRIDE + 6


@pytest.fixture
async def replicas(valkey: ValkeyServer) -> AsyncIterator[list[IndexReplica]]:
    """Two replicas, as two gateways may be on; A and B live."""
    pair = [IndexReplica(valkey.url), IndexReplica(valkey.url)]
    tasks = []
    for replica in pair:
        replica.observe(ClusterSnapshot(workers=(record_of(A), record_of(B)), redis_ok=True))
        tasks.append(asyncio.create_task(replica.announcer.run()))
    yield pair
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for replica in pair:
        await replica.close()


def announce(replica: IndexReplica, worker: PeerRef, chain: list[bytes]) -> None:
    replica.announcer.announce(Announce(worker, [chain[index] for index in landmarks(len(chain))]))


async def announced(replica: IndexReplica, chain: list[bytes]) -> dict[PeerRef, int]:
    matched = await replica.service.on_match(Match(chain))
    return {holder.worker: holder.num_blocks for holder in matched.announced}


def counted(replica: IndexReplica, result: str) -> float:
    labels = {"result": result}
    return replica.prometheus.get_sample_value("phloem_index_announcements_total", labels) or 0.0


async def test_equal_prompt_is_found_through_another_replica_and_is_no_holder(
    replicas: list[IndexReplica],
) -> None:
    one, two = replicas
    announce(one, A, CHAIN)
    await until(lambda: counted(one, "written") == 1)
    assert await announced(two, CHAIN) == {A: 100}
    assert await two.lengths(CHAIN) == {}
    assert two.prometheus.get_sample_value("phloem_index_matched_blocks_total") == 0


async def test_shared_prefix_counts_and_the_last_word_too(replicas: list[IndexReplica]) -> None:
    one, _ = replicas
    announce(one, A, CHAIN)
    announce(one, B, CHAIN[:20])
    await until(lambda: counted(one, "written") == 2)
    assert await announced(one, CHAIN) == {A: 100, B: 16}
    assert await announced(one, CHAIN[:40] + some_chain("other", 60)) == {A: 32, B: 16}
    assert await announced(one, some_chain("other", 60)) == {}


async def test_announcement_stands_beside_what_is_held(replicas: list[IndexReplica]) -> None:
    one, _ = replicas
    slot = await one.slots.attach(A)
    await one.store.publish(Publish(worker=A, slot=slot, seq=1, stored=CHAIN[:7]))
    announce(one, B, CHAIN)
    await until(lambda: counted(one, "written") == 1)
    assert await one.lengths(CHAIN) == {A: 7}
    assert await announced(one, CHAIN) == {B: 100}


async def test_dead_worker_is_not_named(replicas: list[IndexReplica]) -> None:
    one, _ = replicas
    announce(one, DEAD, CHAIN)
    await until(lambda: counted(one, "written") == 1)
    assert await announced(one, CHAIN) == {}


async def test_announcement_is_forgotten_after_its_time(valkey: ValkeyServer) -> None:
    replica = IndexReplica(valkey.url)
    replica.observe(ClusterSnapshot(workers=(record_of(A),), redis_ok=True))
    await replica.store.announce([(block, A) for block in CHAIN], ttl_s=0.3)
    assert await announced(replica, CHAIN) == {A: 100}

    async def forgotten() -> bool:
        return await announced(replica, CHAIN) == {}

    await until_async(forgotten)
    assert await replica.link.command("EXISTS", *map(layout.announcement_key, CHAIN)) == 0
    await replica.close()


async def test_announcements_without_redis_are_dropped_and_counted(
    valkey: ValkeyServer, replicas: list[IndexReplica]
) -> None:
    one, _ = replicas
    valkey.stop()
    announce(one, A, CHAIN)
    await until(lambda: counted(one, "dropped") == 1)
    valkey.start()
    announce(one, A, CHAIN)
    await until(lambda: counted(one, "written") == 1)


async def test_more_than_can_wait_is_dropped(replicas: list[IndexReplica]) -> None:
    one, _ = replicas
    for _ in range(MAX_WAITING + 5):  # nothing is awaited: the writer has no turn
        announce(one, A, CHAIN)
    assert counted(one, "dropped") == 5


async def test_malformed_announcement_is_counted_and_ignored(replicas: list[IndexReplica]) -> None:
    one, _ = replicas
    for message in (Announce(A, [b"short"]), Announce(PeerRef("", 1), CHAIN), Announce(A, CHAIN * 200)):
        one.service.on_announce(message)
    labels = {"method": "Announce", "code": "invalid_value"}
    assert one.prometheus.get_sample_value("phloem_index_errors_total", labels) == 3
    assert await announced(one, CHAIN) == {}
