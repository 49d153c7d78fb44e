"""Look-ups in the cache index: real gRPC, an index that may be late or gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from prometheus_client import CollectorRegistry

from phloem.services.gateway.cluster.index_client import IndexClient, KnownPrefixes
from phloem.services.gateway.cluster.metrics import ClusterMetrics
from phloem.shared.block_hash import landmarks
from phloem.shared.protocol.index import Announce, Holder, Matched
from phloem.shared.protocol.session import PeerRef
from tests.support.fake_index import FakeIndex
from tests.support.waiting import until, until_async

SECRET = b"secret"
W1, W2 = PeerRef("w1", 1), PeerRef("w2", 2)
CHAIN = [bytes([index]) * 16 for index in range(40)]
KNOWN = KnownPrefixes({W1: 128}, {W2: 64})
NOTHING = KnownPrefixes({}, {})
ANSWER = Matched([Holder(W1, 2)], [Holder(W2, 1)])


class Lookups:
    """A client, its metrics, and an index that it may be told of."""

    def __init__(self, index: FakeIndex, timeout_s: float) -> None:
        self.prometheus = CollectorRegistry()
        self.client = IndexClient(SECRET, timeout_s, ClusterMetrics(self.prometheus))
        self.index = index

    @property
    def misses(self) -> float | None:
        return self.prometheus.get_sample_value("phloem_cluster_index_misses_total")

    def announcements(self, result: str) -> float | None:
        labels = {"result": result}
        return self.prometheus.get_sample_value("phloem_cluster_announcements_total", labels)


@pytest.fixture
async def index() -> AsyncIterator[FakeIndex]:
    index = FakeIndex(ANSWER)
    async with index.serving(SECRET):
        yield index


@pytest.fixture
async def lookups(index: FakeIndex) -> AsyncIterator[Lookups]:
    lookups = Lookups(index, 2.0)
    yield lookups
    await lookups.client.close()


async def test_holders_and_announcements_are_counted_in_tokens(lookups: Lookups) -> None:
    await lookups.client.set_addresses([lookups.index.address])
    assert await lookups.client.lookup(CHAIN) == KNOWN
    assert lookups.index.asked == [CHAIN]
    assert lookups.misses == 0


async def test_many_lookups_share_one_stream(lookups: Lookups) -> None:
    await lookups.client.set_addresses([lookups.index.address])
    answers = await asyncio.gather(*(lookups.client.lookup(CHAIN[: n + 1]) for n in range(40)))
    assert answers == [KNOWN] * 40
    assert sorted(map(len, lookups.index.asked)) == list(range(1, 41))
    assert lookups.index.num_streams == 1


async def test_prompt_without_a_full_block_is_not_looked_up(lookups: Lookups) -> None:
    await lookups.client.set_addresses([lookups.index.address])
    assert await lookups.client.lookup([]) == NOTHING
    assert lookups.index.asked == []


async def test_no_index_is_no_knowledge(lookups: Lookups) -> None:
    assert await lookups.client.lookup(CHAIN) == NOTHING
    lookups.client.announce(CHAIN, W1)
    assert lookups.misses == 0


async def test_late_answer_is_a_miss_and_costs_no_more_than_the_deadline(index: FakeIndex) -> None:
    lookups = Lookups(index, 0.02)
    index.late_s = 30.0
    await lookups.client.set_addresses([index.address])
    async with asyncio.timeout(1.0):
        assert await lookups.client.lookup(CHAIN) == NOTHING
    assert lookups.misses == 1
    await lookups.client.close()


async def test_index_that_cannot_answer_is_a_miss(lookups: Lookups) -> None:
    lookups.index.broken = True
    await lookups.client.set_addresses([lookups.index.address])
    assert await lookups.client.lookup(CHAIN) == NOTHING
    assert lookups.misses == 1


async def test_unreachable_index_is_a_miss_and_another_is_asked_then(lookups: Lookups) -> None:
    await lookups.client.set_addresses(["127.0.0.1:1"])
    assert await lookups.client.lookup(CHAIN) == NOTHING
    assert lookups.misses == 1
    await lookups.client.set_addresses(["127.0.0.1:1", lookups.index.address])
    assert [await lookups.client.lookup(CHAIN) for _ in range(4)] == [KNOWN] * 4
    assert lookups.misses == 1


async def test_replica_that_leaves_mid_call_does_not_cancel_the_caller(lookups: Lookups) -> None:
    lookups.index.late_s = 0.2
    await lookups.client.set_addresses([lookups.index.address])
    asking = asyncio.create_task(lookups.client.lookup(CHAIN))
    await until(lambda: lookups.index.asked)
    await lookups.client.set_addresses([])
    assert await asking == KNOWN


async def is_known(lookups: Lookups) -> bool:
    return await lookups.client.lookup(CHAIN) == KNOWN


async def test_stream_is_opened_again_after_the_replica_restarted() -> None:
    lookups = Lookups(FakeIndex(ANSWER), 2.0)
    port = 0
    for _ in range(2):
        async with lookups.index.serving(SECRET, port) as port:
            await lookups.client.set_addresses([lookups.index.address])
            await until_async(lambda: is_known(lookups))
    assert lookups.index.num_streams == 2
    await lookups.client.close()


async def test_decision_is_announced_under_its_landmarks(lookups: Lookups) -> None:
    await lookups.client.set_addresses([lookups.index.address])
    lookups.client.announce(CHAIN, W2)
    await until(lambda: lookups.index.announced)
    assert lookups.index.announced == [Announce(W2, [CHAIN[index] for index in landmarks(40)])]
    assert lookups.announcements("sent") == 1


async def test_announcements_to_an_index_that_does_not_take_them_are_bounded() -> None:
    lookups = Lookups(FakeIndex(ANSWER), 0.02)
    await lookups.client.set_addresses(["127.0.0.1:1"])
    for _ in range(2000):  # nothing is awaited: the stream has no chance to open or to fail
        lookups.client.announce(CHAIN, W1)
    sent, dropped = lookups.announcements("sent"), lookups.announcements("dropped")
    assert sent is not None and dropped is not None
    assert sent + dropped == 2000
    assert dropped >= 900
    await lookups.client.close()
