"""LeaseKeeper and device claims against a real Valkey that crashes and forgets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from phloem.shared.discovery import keys
from phloem.shared.discovery.devices import claim_device
from phloem.shared.discovery.lease import LeaseKeeper, ServiceLease, WorkerLease
from phloem.shared.discovery.registry import Registry
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.cluster import ServiceRecord, WorkerLoad, WorkerRecord
from tests.support.valkey import ValkeyServer
from tests.support.waiting import until, until_async
from tests.support.worker_records import new_record

RECORD = new_record("w", "decode", epoch=10)


@asynccontextmanager
async def held(registry: Registry, events: list[str] | None = None) -> AsyncIterator[LeaseKeeper]:
    seen = events if events is not None else []
    keeper = LeaseKeeper(
        WorkerLease(registry, lambda: RECORD),
        heartbeat_s=0.05,
        on_lost=lambda: seen.append("lost"),
        on_regained=lambda: seen.append("regained"),
    )
    await keeper.acquire()
    task = asyncio.create_task(keeper.run())
    try:
        yield keeper
    finally:
        await keeper.close()
        await task


async def live(registry: Registry) -> list[WorkerRecord]:
    return list((await registry.read()).workers.values())


async def holds(registry: Registry, record: WorkerRecord) -> bool:
    return await live(registry) == [record]


async def test_keeper_holds_the_lease_beyond_its_life_time_and_gives_it_back(registry: Registry) -> None:
    events: list[str] = []
    async with held(registry, events):
        await asyncio.sleep(registry.lease_ttl_s * 1.5)
        assert await live(registry) == [RECORD]
    assert await live(registry) == []
    assert events == []


async def test_heartbeats_carry_the_latest_load(registry: Registry) -> None:
    records = [RECORD]
    keeper = LeaseKeeper(WorkerLease(registry, lambda: records[-1]), heartbeat_s=60.0)
    await keeper.acquire()
    task = asyncio.create_task(keeper.run())
    records.append(msgspec.structs.replace(RECORD, state="draining", load=WorkerLoad(num_running=3)))
    keeper.renew_soon()
    await until_async(lambda: holds(registry, records[-1]))
    await keeper.close()
    await task


async def test_keeper_registers_again_after_flushall_and_reports_it(registry: Registry) -> None:
    events: list[str] = []
    async with held(registry, events):
        await registry.link.command("FLUSHALL")
        await until(lambda: events == ["lost", "regained"])
        assert await live(registry) == [RECORD]


async def test_keeper_reports_the_loss_while_redis_is_down_and_recovers_by_itself(
    registry: Registry, valkey: ValkeyServer
) -> None:
    events: list[str] = []
    async with held(registry, events) as keeper:
        valkey.stop()
        await until(lambda: events == ["lost"])
        assert not keeper.held
        valkey.start()
        await until(lambda: events == ["lost", "regained"])
        assert await live(registry) == [RECORD]


async def test_keeper_reports_a_restart_that_kept_the_lease(registry: Registry) -> None:
    """A server that came back from an append-only file may have lost its last second."""
    events: list[str] = []
    lease = WorkerLease(registry, lambda: RECORD)
    keeper = LeaseKeeper(
        lease,
        heartbeat_s=0.02,
        on_lost=lambda: events.append("lost"),
        on_regained=lambda: events.append("regained"),
    )
    await keeper.acquire()
    keeper._run_id = "the run before"
    task = asyncio.create_task(keeper.run())
    await until(lambda: events == ["lost", "regained"])
    await keeper.close()
    await task


async def test_keeper_ends_when_a_newer_epoch_took_over(registry: Registry) -> None:
    events: list[str] = []
    keeper = LeaseKeeper(
        WorkerLease(registry, lambda: RECORD), heartbeat_s=0.02, on_lost=lambda: events.append("lost")
    )
    await keeper.acquire()
    newer = msgspec.structs.replace(RECORD, epoch=11)
    await registry.renew_worker(newer)
    with pytest.raises(PhloemError) as caught:
        async with asyncio.timeout(5):
            await keeper.run()
    assert caught.value.code == "stale_epoch"
    assert events == ["lost"]
    await keeper.close()
    assert await live(registry) == [newer]


async def test_close_ends_cleanly_while_redis_is_down(registry: Registry, valkey: ValkeyServer) -> None:
    async with asyncio.timeout(5):
        async with held(registry):
            valkey.stop()


async def test_service_lease_is_held_and_given_back(registry: Registry) -> None:
    record = ServiceRecord(kind="cache_index", service_id="i", epoch=1, address="127.0.0.1:2")
    keeper = LeaseKeeper(ServiceLease(registry, record))
    await keeper.acquire()
    assert list((await registry.read()).services.values()) == [record]
    await keeper.close()
    assert (await registry.read()).services == {}


async def test_claims_never_share_a_device(registry: Registry) -> None:
    claims = await asyncio.gather(*(claim_device(registry, "h", range(4), f"w{n}", n) for n in range(4)))
    assert sorted(claim.index for claim in claims) == [0, 1, 2, 3]
    with pytest.raises(PhloemError) as caught:
        await claim_device(registry, "h", range(4), "late", 9)
    assert (caught.value.code, caught.value.retryable) == ("no_free_device", True)
    assert (await claim_device(registry, "another host", range(4), "late", 9)).index == 0
    await claims[2].release()
    assert (await claim_device(registry, "h", range(4), "late", 9)).index == claims[2].index


async def test_claiming_again_returns_the_same_device(registry: Registry) -> None:
    await claim_device(registry, "h", [0, 1], "other", 1)
    first = await claim_device(registry, "h", [0, 1], "w", 2)
    assert (await claim_device(registry, "h", [0, 1], "w", 2)).index == first.index == 1


async def test_claim_without_candidates_is_refused(registry: Registry) -> None:
    with pytest.raises(PhloemError, match="no free device"):
        await claim_device(registry, "h", [], "w", 1)


async def test_older_claim_gets_its_device_back_after_a_loss_of_data(registry: Registry) -> None:
    older = await claim_device(registry, "h", [0], "older", 1)
    await registry.link.command("FLUSHALL")
    newer = await claim_device(registry, "h", [0], "newer", 2)
    assert not (await older.renew()).held
    with pytest.raises(PhloemError) as caught:
        await newer.renew()
    assert (caught.value.code, caught.value.retryable) == ("device_taken", False)
    await newer.release()
    assert (await older.renew()).held


async def test_claim_runs_out_when_its_holder_is_gone(registry: Registry) -> None:
    await claim_device(registry, "h", [0], "w", 1)
    ttl_ms = await registry.link.command("PTTL", keys.device("h", 0))
    assert 0 < ttl_ms <= 10_000
