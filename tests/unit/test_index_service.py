"""Whole replicas, called over gRPC, while Redis comes, goes and forgets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from phloem.services.cache_index.config import CacheIndexConfig
from phloem.services.cache_index.main import run
from phloem.shared.discovery.registry import Registry
from phloem.shared.discovery.secret import cluster_secret
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.index import (
    INDEX_SERVICE,
    Attach,
    Attached,
    Match,
    Matched,
    Publish,
    Published,
    attach,
    attached,
    match,
    matched,
    publish,
    published,
)
from phloem.shared.protocol.session import PeerRef
from phloem.shared.rpc.client import RpcChannel
from tests.support.index_replica import some_chain
from tests.support.valkey import ValkeyServer, free_port
from tests.support.waiting import until_async
from tests.support.worker_records import record_of

WORKER = PeerRef("w", 100)
CHAIN = some_chain("prompt", 128)
TIMEOUT_S = 5.0
MATCH_TIMEOUT_S = 0.4  # long enough to tell an answer that waited for it from one that did not


class Client:
    """Calls one replica."""

    def __init__(self, address: str, secret: bytes) -> None:
        self.channel = RpcChannel(address, secret)
        unary = self.channel.unary
        self._attach: Callable[[Attach, float], Awaitable[Attached]] = unary(
            INDEX_SERVICE, "Attach", attach, attached
        )
        self._publish: Callable[[Publish, float], Awaitable[Published]] = unary(
            INDEX_SERVICE, "Publish", publish, published
        )
        self._match: Callable[[Match, float], Awaitable[Matched]] = unary(
            INDEX_SERVICE, "Match", match, matched
        )

    async def attach(self, worker: PeerRef = WORKER) -> int:
        return (await self._attach(Attach(worker), TIMEOUT_S)).slot

    async def publish(self, slot: int, seq: int, stored: list[bytes], worker: PeerRef = WORKER) -> None:
        message = Publish(worker=worker, slot=slot, seq=seq, stored=stored)
        assert (await self._publish(message, TIMEOUT_S)).seq == seq

    async def match(self, chain: list[bytes], timeout_s: float = TIMEOUT_S) -> dict[PeerRef, int]:
        holders = (await self._match(Match(chain), timeout_s)).holders
        return {holder.worker: holder.num_blocks for holder in holders}


@asynccontextmanager
async def replicas(valkey: ValkeyServer, registry: Registry, count: int) -> AsyncIterator[list[Client]]:
    config = CacheIndexConfig(
        redis_url=valkey.url,
        redis_wait_s=5.0,
        match_timeout_s=MATCH_TIMEOUT_S,
        near_cache_ttl_s=0.0,
        sweep_interval_s=0.05,
        slot_grace_s=0.0,
    )
    tasks = [asyncio.create_task(run(config)) for _ in range(count)]
    async with AsyncExitStack() as stack:
        try:
            await until_async(lambda: num_services(registry, count))
            secret = await cluster_secret(registry)
            services = (await registry.read()).services.values()
            clients = [Client(service.address, secret) for service in services]
            for client in clients:
                stack.push_async_callback(client.channel.close)
            yield clients
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def num_services(registry: Registry, count: int) -> bool:
    return len((await registry.read()).services) == count


@pytest.fixture
async def long_registry(valkey: ValkeyServer) -> AsyncIterator[Registry]:
    """A registry whose leases outlive the test."""
    registry = Registry(valkey.url, lease_ttl_s=3600.0)
    yield registry
    await registry.close()


async def matches(client: Client, expected: dict[PeerRef, int]) -> bool:
    """Whether a Match answers this now; an error is a no."""
    try:
        return await client.match(CHAIN) == expected
    except PhloemError as error:
        assert error.retryable
        return False


async def register_and_publish(registry: Registry, client: Client, blocks: list[bytes]) -> int:
    await registry.renew_worker(record_of(WORKER))
    slot = await client.attach()
    await client.publish(slot, 1, blocks)
    return slot


async def test_two_replicas_agree(valkey: ValkeyServer, long_registry: Registry) -> None:
    async with replicas(valkey, long_registry, 2) as (one, two):
        slot = await register_and_publish(long_registry, one, CHAIN[:50])
        await until_async(lambda: matches(two, {WORKER: 50}))
        await two.publish(slot, 2, CHAIN[50:60])
        assert await one.match(CHAIN) == await two.match(CHAIN) == {WORKER: 60}
        assert await one.match(CHAIN[:7]) == {WORKER: 7}
        assert await one.match(some_chain("unknown", 128)) == await one.match([]) == {}


async def test_worker_that_left_is_not_named_and_its_slot_is_swept(
    valkey: ValkeyServer, long_registry: Registry
) -> None:
    async with replicas(valkey, long_registry, 2) as (one, two):
        slot = await register_and_publish(long_registry, one, CHAIN)
        await until_async(lambda: matches(two, {WORKER: 128}))
        await long_registry.deregister_worker(WORKER.worker_id, WORKER.epoch)
        await until_async(lambda: matches(two, {}))
        other = PeerRef("other", 1)

        async def gets_the_slot() -> bool:
            return await one.attach(other) == slot

        await until_async(gets_the_slot)


async def test_answers_fail_fast_while_redis_is_down_and_recover(
    valkey: ValkeyServer, long_registry: Registry
) -> None:
    async with replicas(valkey, long_registry, 1) as (client,):
        slot = await register_and_publish(long_registry, client, CHAIN)
        await until_async(lambda: matches(client, {WORKER: 128}))
        valkey.stop()
        durations = []
        for _ in range(20):
            start = time.perf_counter()
            with pytest.raises(PhloemError) as caught:
                await client.match(CHAIN)
            durations.append(time.perf_counter() - start)
            assert (caught.value.code, caught.value.retryable) == ("redis_unavailable", True)
        assert min(durations) < 0.005
        assert sorted(durations)[10] < MATCH_TIMEOUT_S / 4
        valkey.start()
        await long_registry.renew_worker(record_of(WORKER))

        async def resync_is_asked_for() -> bool:
            try:
                await client.publish(slot, 2, CHAIN)
            except PhloemError as error:
                assert error.retryable
                return error.code == "resync_needed"
            raise AssertionError("the index forgot its data and takes changes to it")

        await until_async(resync_is_asked_for)
        await client.publish(await client.attach(), 1, CHAIN[:9])
        await until_async(lambda: matches(client, {WORKER: 9}))


async def test_hanging_redis_costs_one_deadline_not_one_per_call(
    valkey: ValkeyServer, long_registry: Registry
) -> None:
    async with replicas(valkey, long_registry, 1) as (client,):
        await register_and_publish(long_registry, client, CHAIN)
        await until_async(lambda: matches(client, {WORKER: 128}))
        valkey.pause()
        try:
            start = time.perf_counter()
            for _ in range(10):
                with pytest.raises(PhloemError):
                    await client.match(CHAIN)
            assert time.perf_counter() - start < 10 * MATCH_TIMEOUT_S / 2
        finally:
            valkey.resume()
        await until_async(lambda: matches(client, {WORKER: 128}))


async def test_index_recovers_from_flushall(valkey: ValkeyServer, long_registry: Registry) -> None:
    async with replicas(valkey, long_registry, 1) as (client,):
        slot = await register_and_publish(long_registry, client, CHAIN)
        await until_async(lambda: matches(client, {WORKER: 128}))
        await long_registry.link.command("FLUSHALL")
        assert await client.match(CHAIN) == {}
        with pytest.raises(PhloemError) as caught:
            await client.publish(slot, 2, CHAIN)
        assert caught.value.code == "resync_needed"
        await register_and_publish(long_registry, client, CHAIN[:30])
        await until_async(lambda: matches(client, {WORKER: 30}))
        await until_async(lambda: num_services(long_registry, 1))


async def test_another_epoch_of_the_worker_is_not_named(
    valkey: ValkeyServer, long_registry: Registry
) -> None:
    async with replicas(valkey, long_registry, 1) as (client,):
        await register_and_publish(long_registry, client, CHAIN)
        await until_async(lambda: matches(client, {WORKER: 128}))
        await long_registry.renew_worker(record_of(PeerRef("w", 101)), notify=True)
        await until_async(lambda: matches(client, {}))
        with pytest.raises(PhloemError) as caught:
            await client.attach()
        assert caught.value.code == "stale_epoch"


@pytest.mark.parametrize(
    ("call", "param"),
    [
        (lambda client: client.match([b"short"]), "block_hashes"),
        (lambda client: client.match([bytes(16)] * 262_145), "block_hashes"),
        (lambda client: client.publish(0, 1, [b""]), "stored"),
        (lambda client: client.publish(1 << 31, 1, []), "slot"),
        (lambda client: client.publish(-1, 1, []), "slot"),
        (lambda client: client.publish(0, 0, []), "seq"),
        (lambda client: client.attach(PeerRef("", 1)), "worker_id"),
        (lambda client: client.attach(PeerRef("x" * 257, 1)), "worker_id"),
    ],
)
async def test_malformed_calls_are_refused(
    valkey: ValkeyServer,
    long_registry: Registry,
    call: Callable[[Client], Awaitable[object]],
    param: str,
) -> None:
    async with replicas(valkey, long_registry, 1) as (client,):
        with pytest.raises(PhloemError) as caught:
            await call(client)
        assert (caught.value.info.http_status, caught.value.info.param) == (400, param)
        assert await client.match(CHAIN) == {}


async def test_start_fails_with_a_remedy_when_redis_is_not_there() -> None:
    config = CacheIndexConfig(redis_url=f"redis://127.0.0.1:{free_port()}/0", redis_wait_s=0.0)
    with pytest.raises(PhloemError) as caught:
        await run(config)
    assert caught.value.code == "redis_unreachable"
    assert "--redis-url" in str(caught.value)
