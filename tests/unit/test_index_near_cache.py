"""Hot blocks in memory: bounded, short-lived, never of another slot table."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phloem.services.cache_index.near_cache import NearCache
from phloem.shared.discovery.snapshot import ClusterSnapshot
from phloem.shared.protocol.index import Publish
from phloem.shared.protocol.session import PeerRef
from tests.support.index_replica import IndexReplica, some_chain, some_hash
from tests.support.valkey import ValkeyServer
from tests.support.worker_records import record_of

TTL_S = 0.5
SLACK_S = 0.5  # one look-up on a busy machine
TABLE, OTHER_TABLE = b"table", b"other table"
BLOCKS = [some_hash(number) for number in range(8)]
WORKER, NEXT = PeerRef("w", 1), PeerRef("w", 2)
CHAIN = some_chain("hot", 40)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def near_cache(clock: Clock, max_blocks: int = 100, ttl_s: float = TTL_S) -> NearCache:
    near = NearCache(max_blocks=max_blocks, ttl_s=ttl_s, clock=clock)
    near.turn_to(TABLE)
    return near


def read_twice(near: NearCache, blocks: list[bytes], bitmaps: list[int], clock: Clock) -> None:
    for _ in range(2):
        near.learn(blocks, bitmaps, TABLE, clock.now)


def test_block_is_kept_when_it_was_read_twice() -> None:
    clock = Clock()
    near = near_cache(clock)
    near.learn(BLOCKS[:2], [1, 2], TABLE, clock.now)
    assert near.known(BLOCKS, TABLE) == {}
    near.learn(BLOCKS[1:3], [2, 4], TABLE, clock.now)
    assert near.known(BLOCKS, TABLE) == {BLOCKS[1]: 2}


def test_block_that_nobody_holds_is_never_kept() -> None:
    clock = Clock()
    near = near_cache(clock)
    read_twice(near, BLOCKS[:2], [1, 1], clock)
    near.learn(BLOCKS[:2], [0, 1], TABLE, clock.now)
    assert near.known(BLOCKS, TABLE) == {BLOCKS[1]: 1}


def test_age_counts_from_the_question_not_from_the_answer() -> None:
    clock = Clock()
    near = near_cache(clock)
    asked_at = clock.now
    clock.now += 0.3
    near.learn(BLOCKS[:1], [1], TABLE, asked_at)
    near.learn(BLOCKS[:1], [1], TABLE, asked_at)
    clock.now = asked_at + TTL_S - 0.01
    assert near.known(BLOCKS, TABLE) == {BLOCKS[0]: 1}
    clock.now = asked_at + TTL_S
    assert near.known(BLOCKS, TABLE) == {}


def test_changed_blocks_are_forgotten() -> None:
    clock = Clock()
    near = near_cache(clock)
    read_twice(near, BLOCKS[:3], [1, 1, 1], clock)
    near.forget(BLOCKS[1:2])
    assert set(near.known(BLOCKS, TABLE)) == {BLOCKS[0], BLOCKS[2]}
    near.turn_to(OTHER_TABLE)
    assert near.known(BLOCKS, TABLE) == {}


def test_late_answer_under_an_old_table_neither_enters_nor_reads_the_new_ones_blocks() -> None:
    """The slot of a bit may have another holder by now."""
    clock = Clock()
    near = near_cache(clock)
    near.learn(BLOCKS, [1] * len(BLOCKS), TABLE, clock.now)
    near.turn_to(OTHER_TABLE)
    near.learn(BLOCKS, [1] * len(BLOCKS), TABLE, clock.now)
    assert near.known(BLOCKS, OTHER_TABLE) == {}
    for _ in range(2):
        near.learn(BLOCKS[:1], [2], OTHER_TABLE, clock.now)
    assert near.known(BLOCKS, OTHER_TABLE) == {BLOCKS[0]: 2}
    assert near.known(BLOCKS, TABLE) == {}


def test_nothing_is_kept_with_a_time_of_zero() -> None:
    clock = Clock()
    near = near_cache(clock, ttl_s=0.0)
    read_twice(near, BLOCKS, [1] * len(BLOCKS), clock)
    assert len(near) == 0


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 7), unique=True, max_size=6), st.floats(0.0, 0.4)), max_size=30
    )
)
def test_never_more_than_its_bound_and_never_older_than_its_time(
    reads: list[tuple[list[int], float]],
) -> None:
    clock = Clock()
    near = near_cache(clock, max_blocks=4)
    last_read: dict[bytes, float] = {}
    for indices, pause_s in reads:
        blocks = [BLOCKS[index] for index in indices]
        near.learn(blocks, [1] * len(blocks), TABLE, clock.now)
        last_read.update(dict.fromkeys(blocks, clock.now))
        clock.now += pause_s
        assert len(near) <= 4
        for block in near.known(BLOCKS, TABLE):
            assert clock.now - last_read[block] < TTL_S


@pytest.fixture
async def replicas(valkey: ValkeyServer) -> AsyncIterator[tuple[IndexReplica, IndexReplica]]:
    """Two replicas that keep hot blocks for a minute, and a worker that holds the whole chain."""
    pair = (IndexReplica(valkey.url, near_ttl_s=60.0), IndexReplica(valkey.url, near_ttl_s=60.0))
    for replica in pair:
        replica.observe(ClusterSnapshot(workers=(record_of(WORKER),), redis_ok=True))
    assert await pair[0].slots.attach(WORKER) == 0
    await pair[0].store.publish(Publish(worker=WORKER, slot=0, seq=1, stored=CHAIN))
    for replica in pair:
        for _ in range(3):
            assert await replica.lengths(CHAIN) == {WORKER: 40}
    yield pair
    for replica in pair:
        await replica.close()


def num_read(replica: IndexReplica, source: str) -> float:
    value = replica.prometheus.get_sample_value("phloem_index_read_blocks_total", {"source": source})
    assert value is not None
    return value


async def test_hot_prompt_is_answered_without_redis(
    valkey: ValkeyServer, replicas: tuple[IndexReplica, IndexReplica]
) -> None:
    one, _ = replicas
    from_redis = num_read(one, "redis")
    valkey.pause()
    assert await one.lengths(CHAIN) == {WORKER: 40}
    valkey.resume()
    assert num_read(one, "redis") == from_redis
    assert num_read(one, "near") >= 40


async def test_prompt_that_goes_on_reads_only_what_is_new(
    replicas: tuple[IndexReplica, IndexReplica],
) -> None:
    one, _ = replicas
    from_redis = num_read(one, "redis")
    assert await one.lengths(CHAIN + some_chain("new", 10)) == {WORKER: 40}
    assert num_read(one, "redis") == from_redis + 10


async def test_what_was_published_through_a_replica_is_known_there_at_once(
    replicas: tuple[IndexReplica, IndexReplica],
) -> None:
    one, _ = replicas
    await one.service.on_publish(Publish(worker=WORKER, slot=0, seq=2, removed=CHAIN[30:]))
    assert await one.lengths(CHAIN) == {WORKER: 30}


async def test_block_that_was_evicted_elsewhere_is_named_no_longer_than_its_time(
    valkey: ValkeyServer,
) -> None:
    one, two = IndexReplica(valkey.url, near_ttl_s=TTL_S), IndexReplica(valkey.url, near_ttl_s=TTL_S)
    two.observe(ClusterSnapshot(workers=(record_of(WORKER),), redis_ok=True))
    slot = await one.slots.attach(WORKER)
    await one.store.publish(Publish(worker=WORKER, slot=slot, seq=1, stored=CHAIN))
    for _ in range(3):
        assert await two.lengths(CHAIN) == {WORKER: 40}
    await one.store.publish(Publish(worker=WORKER, slot=slot, seq=2, removed=CHAIN[30:]))
    evicted_at = time.monotonic()
    while await two.lengths(CHAIN) != {WORKER: 30}:  # asked all the time: being hot does not keep it
        assert time.monotonic() - evicted_at < TTL_S + SLACK_S
    for replica in (one, two):
        await replica.close()


async def test_worker_that_died_is_not_named_however_hot_its_blocks_are(
    replicas: tuple[IndexReplica, IndexReplica],
) -> None:
    _, two = replicas
    two.observe(ClusterSnapshot(workers=(record_of(NEXT),), redis_ok=True))
    assert await two.lengths(CHAIN) == {}


async def test_new_slot_table_empties_the_cache(replicas: tuple[IndexReplica, IndexReplica]) -> None:
    one, two = replicas
    slot = await one.slots.attach(NEXT)  # the worker restarted; its old slot is retired
    await one.store.publish(Publish(worker=NEXT, slot=slot, seq=1, stored=CHAIN[:5]))
    two.observe(ClusterSnapshot(workers=(record_of(NEXT),), redis_ok=True))
    assert await two.lengths(CHAIN + some_chain("new", 1)) == {NEXT: 5}
    assert await two.lengths(CHAIN) == {NEXT: 5}
