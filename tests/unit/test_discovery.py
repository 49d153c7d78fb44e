"""Registration, fencing by epoch, and what watchers see, against a real Valkey."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Literal

import msgspec
import pytest

from phloem.shared.discovery import keys
from phloem.shared.discovery.registry import Registry
from phloem.shared.discovery.secret import cluster_secret, reassert_secret
from phloem.shared.discovery.snapshot import ClusterSnapshot
from phloem.shared.errors import ConfigError, PhloemError
from phloem.shared.protocol.cluster import ServiceRecord, WorkerLoad
from tests.support.valkey import ValkeyServer, free_port, running_valkey
from tests.support.worker_records import new_record


async def seen(
    snapshots: AsyncIterator[ClusterSnapshot], condition: Callable[[ClusterSnapshot], bool]
) -> ClusterSnapshot:
    """The first snapshot for which `condition` holds; fails after 10 s."""
    async with asyncio.timeout(10):
        async for snapshot in snapshots:
            if condition(snapshot):
                return snapshot
    raise AssertionError("watch ended")


def ids(snapshot: ClusterSnapshot) -> list[str]:
    return [record.worker_id for record in snapshot.workers]


async def test_epochs_grow_also_after_redis_lost_its_data(registry: Registry) -> None:
    before = [await registry.next_epoch() for _ in range(20)]
    await registry.link.command("FLUSHALL")
    after = [await registry.next_epoch() for _ in range(20)]
    assert before + after == sorted(set(before + after))


async def test_epochs_grow_when_the_counter_is_ahead_of_the_clock(registry: Registry) -> None:
    ahead = await registry.next_epoch() + 10_000_000
    await registry.link.command("SET", keys.EPOCH_COUNTER, ahead)
    assert await registry.next_epoch() == ahead + 1


async def test_reading_returns_the_registered_records(registry: Registry) -> None:
    gateway = ServiceRecord(kind="gateway", service_id="g", epoch=3, address="127.0.0.1:9")
    assert not (await registry.renew_worker(new_record())).held
    assert (await registry.renew_worker(new_record())).held
    await registry.renew_service(gateway)
    reading = await registry.read()
    assert list(reading.workers.values()) == [new_record()]
    assert list(reading.services.values()) == [gateway]


async def test_older_epoch_never_overwrites_a_newer_one(registry: Registry) -> None:
    await registry.renew_worker(new_record(epoch=5))
    with pytest.raises(PhloemError) as caught:
        await registry.renew_worker(new_record(epoch=4))
    assert caught.value.code == "stale_epoch"
    assert not caught.value.retryable
    assert "another process runs with the same --worker-id" in str(caught.value)
    await registry.renew_worker(new_record(epoch=6))
    assert [record.epoch for record in (await registry.read()).workers.values()] == [6]


@pytest.mark.parametrize(("kind", "flag"), [("gateway", "--gateway-id"), ("cache_index", "--service-id")])
async def test_replaced_service_is_told_the_flag_of_its_name(
    registry: Registry, kind: Literal["gateway", "cache_index"], flag: str
) -> None:
    record = ServiceRecord(kind=kind, service_id="s", epoch=5, address="127.0.0.1:9")
    await registry.renew_service(record)
    with pytest.raises(PhloemError, match=f"epoch 5 came after it: .* the same {flag}"):
        await registry.renew_service(msgspec.structs.replace(record, epoch=4))


async def test_fence_outlives_the_lease(registry: Registry) -> None:
    await registry.renew_worker(new_record(epoch=5))
    await registry.link.command("DEL", keys.lease(keys.worker_member("w")))
    with pytest.raises(PhloemError, match="epoch 5 came after"):
        await registry.renew_worker(new_record(epoch=4))


async def test_heartbeat_in_flight_can_not_reopen_a_lease_that_was_given_back(registry: Registry) -> None:
    await registry.renew_worker(new_record(epoch=5))
    assert await registry.deregister_worker("w", 5)
    with pytest.raises(PhloemError) as caught:
        await registry.renew_worker(new_record(epoch=5))
    assert caught.value.code == "stale_epoch"
    assert (await registry.read()).workers == {}


async def test_old_epoch_can_not_deregister_its_successor(registry: Registry) -> None:
    await registry.renew_worker(new_record(epoch=5))
    assert not await registry.deregister_worker("w", 4)
    assert len((await registry.read()).workers) == 1


async def test_unreadable_record_hides_no_other_member(registry: Registry) -> None:
    await registry.renew_worker(new_record("bad"))
    await registry.renew_worker(new_record("good"))
    await registry.link.command("SET", keys.lease(keys.worker_member("bad")), b"\xc1", "PX", 10_000)
    assert [record.worker_id for record in (await registry.read()).workers.values()] == ["good"]


async def test_watcher_sees_join_state_change_and_leave_before_it_polls(valkey: ValkeyServer) -> None:
    registry = Registry(valkey.url, poll_interval_s=60.0)
    try:
        async with aclosing(registry.watch()) as snapshots:
            assert (await anext(snapshots)).workers == ()
            first = asyncio.create_task(seen(snapshots, lambda s: ids(s) == ["w"]))
            await registry.renew_worker(new_record())
            await first
            draining = msgspec.structs.replace(new_record(), state="draining")
            second = asyncio.create_task(seen(snapshots, lambda s: s.workers == (draining,)))
            await registry.renew_worker(draining, notify=True)
            await second
            third = asyncio.create_task(seen(snapshots, lambda s: not s.workers))
            await registry.deregister_worker("w", 1)
            await third
    finally:
        await registry.close()


async def test_watcher_drops_a_worker_whose_lease_ran_out(registry: Registry) -> None:
    await registry.renew_worker(new_record("dies"))
    async with aclosing(registry.watch()) as snapshots:
        await seen(snapshots, lambda s: ids(s) == ["dies"])
        start = time.monotonic()
        await seen(snapshots, lambda s: not s.workers)
    assert time.monotonic() - start < 0.6 + 0.1 + 0.5


async def test_poll_carries_the_load(registry: Registry) -> None:
    await registry.renew_worker(new_record())
    async with aclosing(registry.watch()) as snapshots:
        await seen(snapshots, lambda s: ids(s) == ["w"])
        await registry.renew_worker(msgspec.structs.replace(new_record(), load=WorkerLoad(num_running=7)))
        await seen(snapshots, lambda s: any(w.load.num_running == 7 for w in s.workers))


async def test_watcher_keeps_the_members_while_redis_is_down(
    registry: Registry, valkey: ValkeyServer
) -> None:
    await registry.renew_worker(new_record())
    async with aclosing(registry.watch()) as snapshots:
        before = await seen(snapshots, lambda s: ids(s) == ["w"])
        valkey.stop()
        down = await seen(snapshots, lambda s: not s.redis_ok and s.age_s > 0.7)
        assert down.workers == before.workers
        valkey.start()
        back = await seen(snapshots, lambda s: s.redis_ok)
        assert back.generation != before.generation
        assert ids(back) == ["w"]  # kept for a lease time, in which it registers again
        await seen(snapshots, lambda s: not s.workers)  # it did not


async def test_watcher_survives_a_server_that_hangs(registry: Registry, valkey: ValkeyServer) -> None:
    await registry.renew_worker(new_record())
    async with aclosing(registry.watch()) as snapshots:
        await seen(snapshots, lambda s: ids(s) == ["w"])
        valkey.pause()
        try:
            assert ids(await seen(snapshots, lambda s: not s.redis_ok)) == ["w"]
        finally:
            valkey.resume()
        await seen(snapshots, lambda s: s.redis_ok)


async def test_watcher_keeps_the_members_through_flushall_but_not_those_that_leave(
    registry: Registry,
) -> None:
    for name in ("stays", "leaves"):
        await registry.renew_worker(new_record(name))
    async with aclosing(registry.watch()) as snapshots:
        before = await seen(snapshots, lambda s: len(s.workers) == 2)
        await registry.link.command("FLUSHALL")
        await seen(snapshots, lambda s: s.generation != before.generation and len(s.workers) == 2)
        await registry.renew_worker(new_record("stays"))
        await registry.deregister_worker("leaves", 1)
        await seen(snapshots, lambda s: ids(s) == ["stays"])


async def test_connect_waits_with_a_message_then_fails_with_a_remedy() -> None:
    registry = Registry(f"redis://:hush@127.0.0.1:{free_port()}/0", timeout_s=0.2)
    waits: list[float] = []
    with pytest.raises(PhloemError) as caught:
        await registry.connect(1.2, waits.append)
    await registry.close()
    assert caught.value.code == "redis_unreachable"
    assert "--redis-url" in str(caught.value)
    assert "hush" not in str(caught.value)
    assert len(waits) >= 2


async def test_connect_returns_once_redis_is_there() -> None:
    with running_valkey() as server:
        server.stop()
        registry = Registry(server.url)
        await registry.connect(10.0, lambda elapsed: server.start() if elapsed < 0.9 else None)
        await registry.close()


async def test_connect_fails_at_once_when_the_password_is_wrong() -> None:
    with running_valkey(password="right") as server:
        registry = Registry(server.url.replace("right", "wrong"))
        with pytest.raises(PhloemError) as caught:
            await registry.connect(30.0)
        await registry.close()
        assert caught.value.code == "redis_refused"
        accepted = Registry(server.url)
        await accepted.connect(30.0)
        await accepted.close()


def test_bad_url_is_a_config_error() -> None:
    with pytest.raises(ConfigError):
        Registry("http://127.0.0.1:1")


async def test_commands_fail_within_their_deadline_when_redis_hangs(
    registry: Registry, valkey: ValkeyServer
) -> None:
    await registry.next_epoch()
    valkey.pause()
    try:
        start = time.monotonic()
        with pytest.raises(PhloemError) as caught:
            await registry.next_epoch()
        assert time.monotonic() - start < 1.0
        assert (caught.value.code, caught.value.retryable) == ("redis_unavailable", True)
    finally:
        valkey.resume()
    assert await registry.next_epoch() > 0


async def test_processes_agree_on_a_secret_and_put_it_back_after_a_loss(registry: Registry) -> None:
    first, second = await asyncio.gather(cluster_secret(registry), cluster_secret(registry))
    assert first == second
    assert len(first) >= 32
    await registry.link.command("FLUSHALL")
    await reassert_secret(registry, first)
    assert await cluster_secret(registry) == first


async def test_configured_secret_wins_and_is_not_written_to_redis(registry: Registry) -> None:
    assert await cluster_secret(registry, "configured") == b"configured"
    assert await registry.link.command("EXISTS", keys.CLUSTER_SECRET) == 0


async def test_cancelled_command_always_ends_its_task(valkey: ValkeyServer) -> None:
    """Also one that is cancelled while it connects, sends, or has its answer already."""
    for num_steps in range(120):
        registry = Registry(valkey.url)
        task = asyncio.create_task(endless_commands(registry))
        for _ in range(num_steps):
            await asyncio.sleep(0)
        task.cancel()
        async with asyncio.timeout(5):
            await asyncio.wait({task})
        assert task.cancelled()
        await registry.close()


async def endless_commands(registry: Registry) -> None:
    while True:
        await registry.link.command("PING")
