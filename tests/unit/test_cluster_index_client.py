"""Look-ups in the cache index: real gRPC, an index that may be late or gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from prometheus_client import CollectorRegistry

from phloem.services.gateway.cluster.index_client import IndexClient
from phloem.services.gateway.cluster.metrics import ClusterMetrics
from phloem.shared.protocol.index import INDEX_SERVICE, Holder, Match, Matched, match, matched
from phloem.shared.protocol.session import PeerRef
from phloem.shared.rpc.server import RpcServer
from tests.support.waiting import until

SECRET = b"secret"
W1, W2 = PeerRef("w1", 1), PeerRef("w2", 2)


class FakeIndex:
    """W1 holds two blocks of everything, W2 one; `late_s` delays the answer."""

    def __init__(self) -> None:
        self.asked: list[list[bytes]] = []
        self.late_s = 0.0

    async def on_match(self, message: Match) -> Matched:
        self.asked.append(message.block_hashes)
        await asyncio.sleep(self.late_s)
        return Matched([Holder(W1, 2), Holder(W2, 1)])


class Lookups:
    """A client, its metrics, and an index that it may be told of."""

    def __init__(
        self, client: IndexClient, registry: CollectorRegistry, index: FakeIndex, address: str
    ) -> None:
        self.client = client
        self.index = index
        self.address = address
        self._registry = registry

    @property
    def misses(self) -> float | None:
        return self._registry.get_sample_value("phloem_cluster_index_misses_total")


@pytest.fixture
async def lookups() -> AsyncIterator[Lookups]:
    index = FakeIndex()
    server = RpcServer(SECRET)
    server.add_unary(INDEX_SERVICE, "Match", match, matched, index.on_match)
    port = await server.start("127.0.0.1", 0)
    registry = CollectorRegistry()
    client = IndexClient(SECRET, 2.0, ClusterMetrics(registry))
    yield Lookups(client, registry, index, f"127.0.0.1:{port}")
    await client.close()
    await server.stop(0)


async def test_holders_are_counted_in_tokens(lookups: Lookups) -> None:
    await lookups.client.set_addresses([lookups.address])
    assert await lookups.client.cached_tokens([b"a" * 16, b"b" * 16]) == {W1: 128, W2: 64}
    assert lookups.index.asked == [[b"a" * 16, b"b" * 16]]
    assert lookups.misses == 0


async def test_prompt_without_a_full_block_is_not_looked_up(lookups: Lookups) -> None:
    await lookups.client.set_addresses([lookups.address])
    assert await lookups.client.cached_tokens([]) == {}
    assert lookups.index.asked == []


async def test_no_index_is_no_knowledge(lookups: Lookups) -> None:
    assert await lookups.client.cached_tokens([b"a" * 16]) == {}
    assert lookups.misses == 0


async def test_late_answer_is_a_miss_and_costs_no_more_than_the_deadline(lookups: Lookups) -> None:
    registry = CollectorRegistry()
    client = IndexClient(SECRET, 0.02, ClusterMetrics(registry))
    lookups.index.late_s = 30.0
    await client.set_addresses([lookups.address])
    async with asyncio.timeout(1.0):
        assert await client.cached_tokens([b"a" * 16]) == {}
    assert registry.get_sample_value("phloem_cluster_index_misses_total") == 1
    await client.close()


async def test_unreachable_index_is_a_miss(lookups: Lookups) -> None:
    await lookups.client.set_addresses(["127.0.0.1:1"])
    assert await lookups.client.cached_tokens([b"a" * 16]) == {}
    assert lookups.misses == 1


async def test_replica_that_leaves_mid_call_does_not_cancel_the_caller(lookups: Lookups) -> None:
    lookups.index.late_s = 0.2
    await lookups.client.set_addresses([lookups.address])
    asking = asyncio.create_task(lookups.client.cached_tokens([b"a" * 16]))
    await until(lambda: lookups.index.asked)
    await lookups.client.set_addresses([])
    assert await asking == {W1: 128, W2: 64}
