"""A worker's front over a fake engine: real gRPC, a real Valkey, a real child process."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from phloem.shared.discovery.registry import Registry
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.session import (
    Abort,
    Hello,
    LoadReport,
    SessionDown,
)
from tests.support.fake_engine import DIE_TOKEN, FAIL_TOKEN, FIRST_TOKEN, HANG_TOKEN
from tests.support.front_gateway import Gateway
from tests.support.valkey import ValkeyServer
from tests.support.waiting import until, until_async
from tests.support.worker_front import Front, raises_code, replaced, running_front


@pytest.fixture
async def front(valkey: ValkeyServer, tmp_path: Path) -> AsyncIterator[Front]:
    async with running_front(valkey.url, tmp_path) as front:
        yield front


async def test_request_gets_its_tokens_and_one_end(front: Front) -> None:
    gateway = Gateway(front)
    welcome = await gateway.hello()
    assert (welcome.worker_id, welcome.epoch, welcome.role) == ("w1", front.record.epoch, "unified")
    await gateway.submit("r", 4)
    tokens, ended = (await gateway.collect(1))["r"]
    assert tokens == [FIRST_TOKEN + n for n in range(4)]
    assert ended.reason == "finished"


async def test_every_gateway_hears_of_the_load_as_it_changes(front: Front) -> None:
    busy, other = Gateway(front), Gateway(front)
    await busy.hello("busy")
    await other.hello("other")
    await busy.submit("r", 100_000)
    async with asyncio.timeout(10):
        message = await anext(other.answers)
    assert isinstance(message, LoadReport) and message.load.num_running == 1
    assert message.epoch == front.record.epoch


async def test_record_says_what_the_engine_is(front: Front) -> None:
    record = front.record
    assert (record.role, record.page_size, record.context_length, record.kv_layout) == (
        "unified",
        16,
        1000,
        "fake",
    )
    assert record.rpc_address.startswith("127.0.0.1:")
    assert (record.load.free_pages, record.load.total_pages) == (64, 64)


async def test_gateway_gets_at_most_one_message_per_engine_step(front: Front) -> None:
    gateways = [Gateway(front), Gateway(front)]
    for number, gateway in enumerate(gateways):
        await gateway.hello(f"g{number}")
        for index in range(16):
            await gateway.submit(f"{number}-{index}", 20)
    for gateway in gateways:
        results = await gateway.collect(16)
        assert all(tokens == [FIRST_TOKEN + n for n in range(20)] for tokens, _ in results.values())
        assert len(set(gateway.steps)) == len(gateway.steps)
    steps = (await front.audit()).counters["steps"]
    metrics = await front.metrics()
    assert metrics["phloem_engine_steps_reported_total"] == steps
    for number, gateway in enumerate(gateways):
        sent = metrics[f'phloem_session_messages_total{{gateway="g{number}",kind="step"}}']
        assert sent == len(gateway.steps) <= steps


async def test_abort_ends_the_request_once(valkey: ValkeyServer, tmp_path: Path) -> None:
    async with running_front(valkey.url, tmp_path) as front:
        gateway = Gateway(front)
        await gateway.hello()
        await gateway.submit("r", 100_000)
        await gateway.first_tokens()
        for _ in range(3):
            await gateway.stream.write(Abort("r", 1))
        await gateway.stream.write(Abort("unknown", 1))
        _, ended = (await gateway.collect(1))["r"]
        assert ended.reason == "aborted"
        audit = await front.audit()
        assert (audit.num_requests, audit.counters["EngineAbort"]) == (0, 1)


async def test_submit_for_another_epoch_ends_as_stale(front: Front) -> None:
    gateway = Gateway(front)
    await gateway.hello()
    await gateway.submit("r", 4, epoch=front.record.epoch - 1)
    tokens, ended = (await gateway.collect(1))["r"]
    assert tokens == []
    assert ended.reason == "failed" and ended.error is not None
    assert (ended.error.code, ended.error.retryable) == ("stale_epoch", True)
    assert "EngineSubmit" not in (await front.audit()).counters


async def test_session_that_breaks_takes_its_requests_along(front: Front) -> None:
    lost, kept = Gateway(front), Gateway(front)
    await lost.hello("lost")
    await kept.hello("kept")
    await lost.submit("a", 100_000)
    await kept.submit("b", 100_000)
    await lost.first_tokens()
    lost.stream.cancel()

    async def aborted() -> bool:
        audit = await front.audit()
        return audit.counters.get("AbortGateway") == 1 and audit.num_requests == 1

    await until_async(aborted)
    await kept.first_tokens()
    assert (await front.metrics())["phloem_requests_in_flight"] == 1


@pytest.mark.parametrize("first", [Abort("r", 1), Hello("g", protocol_version=99)])
async def test_session_that_begins_wrong_is_refused(front: Front, first: SessionDown) -> None:
    gateway = Gateway(front)
    await gateway.stream.write(first)
    assert (await gateway.error()).code in ("bad_session", "protocol_mismatch")


async def test_second_submit_of_one_attempt_ends_the_session(front: Front) -> None:
    gateway = Gateway(front)
    await gateway.hello()
    await gateway.submit("r", 100_000)
    await gateway.submit("r", 100_000)
    assert (await gateway.error()).code == "bad_session"


async def test_drain_lets_requests_end_then_deregisters(valkey: ValkeyServer, tmp_path: Path) -> None:
    registry = Registry(valkey.url)
    async with running_front(valkey.url, tmp_path, step_s=0.02) as front:
        gateway = Gateway(front)
        await gateway.hello()
        await gateway.submit("r", 60)  # 1.2 s
        await gateway.first_tokens()
        await front.drain()

        async def draining() -> bool:
            record = (await registry.read()).workers.get("worker:w1")
            return record is not None and record.state == "draining"

        await until_async(draining)
        tokens, ended = (await gateway.collect(1))["r"]
        assert ended.reason == "finished" and tokens[-1] == FIRST_TOKEN + 59
        async with asyncio.timeout(10):
            await front.task
        assert (await registry.read()).workers == {}
    await registry.close()


async def test_draining_worker_refuses_new_requests(valkey: ValkeyServer, tmp_path: Path) -> None:
    async with running_front(valkey.url, tmp_path, step_s=0.02) as front:
        gateway = Gateway(front)
        await gateway.hello()
        await gateway.submit("long", 100_000)
        await front.drain()
        refused = None
        for index in range(1000):  # until the worker's lame-duck time is over
            await gateway.submit(str(index), 1)
            _, ended = (await gateway.collect(1))[str(index)]
            if ended.reason == "failed":
                refused = ended.error
                break
        assert refused is not None and (refused.code, refused.retryable) == ("draining", True)


async def test_drain_is_bounded(valkey: ValkeyServer, tmp_path: Path) -> None:
    change = replaced(drain_timeout_s=0.2)
    async with running_front(valkey.url, tmp_path, change=change) as front:
        gateway = Gateway(front)
        await gateway.hello()
        await gateway.submit("endless", 100_000_000)
        await front.drain()
        error = await gateway.error()
        assert (error.code, error.retryable) == ("worker_stopped", True)
        async with asyncio.timeout(10):
            await front.task


@pytest.mark.parametrize(
    ("first", "code", "words"),
    [(DIE_TOKEN, "engine_died", "exited with code 3"), (FAIL_TOKEN, "out_of_memory", "out of memory")],
)
async def test_lost_engine_ends_sessions_and_the_front(
    valkey: ValkeyServer, tmp_path: Path, first: int, code: str, words: str
) -> None:
    registry = Registry(valkey.url)
    async with running_front(valkey.url, tmp_path) as front:
        gateway = Gateway(front)
        await gateway.hello()
        await gateway.submit("r", 4, first=first)
        error = await gateway.error()
        assert error.code == code and words in str(error)
        await until(front.task.done)
        assert (await registry.read()).workers == {}
        with pytest.RaisesGroup(pytest.RaisesExc(PhloemError, match=words)):
            await front.task
    await registry.close()


async def test_suspended_engine_is_given_up(front: Front) -> None:
    gateway = Gateway(front)
    await gateway.hello()
    await gateway.submit("r", 100_000)
    await gateway.first_tokens()
    os.kill((await front.audit()).counters["pid"], signal.SIGSTOP)
    error = await gateway.error()
    assert (error.code, error.retryable) == ("engine_hung", True)
    await until(front.task.done)


async def test_engine_that_says_nothing_while_busy_is_given_up(valkey: ValkeyServer, tmp_path: Path) -> None:
    change = replaced(engine_hang_timeout_s=0.3)
    async with running_front(valkey.url, tmp_path, change=change) as front:
        gateway = Gateway(front)
        await gateway.hello()
        await gateway.submit("r", 4, first=HANG_TOKEN)
        error = await gateway.error()
        assert (error.code, error.retryable) == ("engine_hung", True)
        await until(front.task.done)


async def test_flush_and_audit_answer_for_the_right_epoch_only(front: Front) -> None:
    gateway = Gateway(front)
    await gateway.hello()
    await gateway.submit("r", 1)
    await gateway.collect(1)
    await front.flush()
    assert (await front.audit()).counters["FlushCache"] == 1
    assert await raises_code(front.flush(epoch=1)) == "stale_epoch"


async def test_prefill_front_tells_its_engine_of_decode_workers(valkey: ValkeyServer, tmp_path: Path) -> None:
    async def told(front: Front, message: str, count: int) -> None:
        async def reached() -> bool:
            return (await front.audit()).counters.get(message, 0) == count

        await until_async(reached)

    async with running_front(valkey.url, tmp_path, "prefill", worker_id="p") as prefill:
        async with running_front(valkey.url, tmp_path, "decode", worker_id="d") as decode:
            await told(prefill, "PeerUp", 1)
            await decode.drain()
            async with asyncio.timeout(10):
                await decode.task
        await told(prefill, "PeerDown", 1)


async def test_front_registers_again_after_redis_lost_its_data(front: Front, valkey: ValkeyServer) -> None:
    valkey.stop()
    valkey.start()
    registry = Registry(valkey.url)

    async def registered() -> bool:
        return "worker:w1" in (await registry.read()).workers

    await until_async(registered)
    await registry.close()


async def test_engine_gets_the_threads_it_is_told(front: Front) -> None:
    assert (await front.audit()).counters["omp"] == 1


async def test_missing_model_is_refused_before_an_engine_starts(valkey: ValkeyServer, tmp_path: Path) -> None:
    engine = replaced(engine={"model_path": "/nowhere/at/all"})
    with pytest.raises(PhloemError, match="/nowhere/at/all"):
        async with running_front(valkey.url, tmp_path, change=engine):
            pass


async def test_unreachable_redis_fails_after_its_bound(tmp_path: Path) -> None:
    with pytest.raises(PhloemError) as caught:
        async with running_front("redis://127.0.0.1:1/0", tmp_path, change=replaced(redis_wait_s=0.1)):
            pass
    assert caught.value.code == "redis_unreachable"
