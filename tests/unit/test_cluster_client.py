"""The cluster client against scripted workers and real fronts: real gRPC, a real Valkey."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TypeAlias

import pytest
from prometheus_client import CollectorRegistry

from phloem.services.gateway.cluster.client import ClusterClient
from phloem.services.gateway.cluster.options import ClusterOptions
from phloem.services.gateway.generation import GeneratedTokens, GenerationRequest
from phloem.shared.discovery.lease import LeaseKeeper, ServiceLease
from phloem.shared.discovery.registry import Registry
from phloem.shared.errors import ErrorInfo, PhloemError
from phloem.shared.protocol.cluster import Role, ServiceRecord, WorkerLoad
from phloem.shared.protocol.index import Holder, Matched
from phloem.shared.protocol.session import SamplingParams
from tests.support.fake_index import FakeIndex
from tests.support.fake_worker import FIRST_TOKEN, FakeWorker, fake_worker
from tests.support.valkey import ValkeyServer
from tests.support.waiting import until
from tests.support.worker_front import SECRET, running_front

NewWorker: TypeAlias = Callable[[str, Role], AbstractAsyncContextManager[FakeWorker]]
QUICK = ClusterOptions(worker_wait_s=0.3, handover_grace_s=0.3, worker_silence_s=0.2)
BUSY = ErrorInfo("queue_full", "the queue is full", retryable=True, http_status=503)


@asynccontextmanager
async def running_client(registry: Registry, options: ClusterOptions = QUICK) -> AsyncIterator[ClusterClient]:
    """A client that has left nothing behind when the test is over."""
    async with ClusterClient(registry, SECRET.encode(), "g1", CollectorRegistry(), options) as client:
        yield client
        assert client.is_idle


@pytest.fixture
async def client(registry: Registry) -> AsyncIterator[ClusterClient]:
    async with running_client(registry) as client:
        yield client


@pytest.fixture
def new_worker(registry: Registry, client: ClusterClient) -> NewWorker:
    """Starts a worker and waits until the client has its session."""

    @asynccontextmanager
    async def start(worker_id: str, role: Role) -> AsyncIterator[FakeWorker]:
        async with fake_worker(registry, worker_id, role, SECRET.encode()) as worker:
            await until(lambda: worker.ref in client.workers())
            yield worker

    return start


def request(request_id: str = "r", max_tokens: int = 4, timeout_s: float = 30.0) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id,
        token_ids=list(range(1, 201)),
        sampling=SamplingParams(max_tokens=max_tokens),
        timeout_s=timeout_s,
    )


@asynccontextmanager
async def index_that_answers(registry: Registry, answer: Matched) -> AsyncIterator[FakeIndex]:
    """A registered cache index with one answer to everything."""

    index = FakeIndex(answer)
    async with index.serving(SECRET.encode()):
        record = ServiceRecord(kind="cache_index", service_id="i", epoch=1, address=index.address)
        keeper = LeaseKeeper(ServiceLease(registry, record), heartbeat_s=0.2)
        await keeper.acquire()
        beating = asyncio.create_task(keeper.run())
        yield index
        await keeper.close()
        await beating


class Consumer:
    """Takes a request's tokens in a task of its own."""

    def __init__(self, client: ClusterClient, wanted: GenerationRequest) -> None:
        self.tokens: list[int] = []
        self.reasons: list[str] = []
        self._generation = client.generate(wanted)
        self.task = asyncio.create_task(self._consume(self._generation))

    async def _consume(self, generation: AsyncGenerator[GeneratedTokens, None]) -> list[int]:
        async for item in generation:
            self.tokens += item.token_ids
            if item.finish_reason is not None:
                self.reasons.append(item.finish_reason)
        return self.tokens

    async def result(self) -> list[int]:
        async with asyncio.timeout(10):
            return await self.task

    async def error(self) -> PhloemError:
        try:
            await self.result()
        except PhloemError as error:
            return error
        raise AssertionError("the request ended without an error")


def expected(max_tokens: int) -> list[int]:
    return [FIRST_TOKEN + index for index in range(max_tokens)]


async def within(seconds: float, awaitable: Awaitable[object]) -> None:
    async with asyncio.timeout(seconds):
        await awaitable


# -- the happy path --------------------------------------------------------------------------------------


async def test_tokens_of_a_pair_come_in_order(client: ClusterClient, new_worker: NewWorker) -> None:
    async with new_worker("p", "prefill") as p, new_worker("d", "decode") as d:
        consumer = Consumer(client, request())
        to_p, to_d = await p.next_submit(), await d.next_submit()
        assert (to_p.phase, to_p.peer, to_d.phase, to_d.peer) == ("prefill", d.ref, "decode", p.ref)
        assert to_p.block_hashes == to_d.block_hashes and len(to_p.block_hashes) == 3
        d.send(d.tokens(to_d, 1, 2))
        await until(lambda: client.heard(d.ref) == 1)
        assert consumer.tokens == []
        p.send(p.tokens(to_p, 0), p.ended(to_p, "handed_over"))
        await until(lambda: consumer.tokens == expected(3))
        d.send(d.tokens(to_d, 3, finish="length"), d.ended(to_d, "finished"))
        assert await consumer.result() == expected(4)
        assert consumer.reasons == ["length"]
        assert (p.aborts, d.aborts) == ([], [])


async def test_request_that_ends_with_token_0_is_aborted_on_decode(
    client: ClusterClient, new_worker: NewWorker
) -> None:
    async with new_worker("p", "prefill") as p, new_worker("d", "decode") as d:
        consumer = Consumer(client, request())
        to_p = await p.next_submit()
        p.send(p.tokens(to_p, 0, finish="stop"), p.ended(to_p, "finished"))
        assert await consumer.result() == expected(1)
        await until(lambda: d.aborts == [("r", 1)])


async def test_client_that_goes_away_aborts_on_both(client: ClusterClient, new_worker: NewWorker) -> None:
    async with new_worker("p", "prefill") as p, new_worker("d", "decode") as d:
        generation = client.generate(request())
        taking = asyncio.ensure_future(anext(generation))
        to_p = await p.next_submit()
        p.send(p.tokens(to_p, 0))
        assert (await taking).token_ids == expected(1)
        await generation.aclose()
        assert client.is_idle
        await until(lambda: p.aborts == [("r", 1)] and d.aborts == [("r", 1)])


async def test_slow_consumer_holds_nobody_up(client: ClusterClient, new_worker: NewWorker) -> None:
    async with new_worker("u", "unified") as u:
        slow = client.generate(request("slow", 1000))
        taking = asyncio.ensure_future(anext(slow))
        to_slow = await u.next_submit()
        u.send(u.tokens(to_slow, 0))
        await taking
        quick = Consumer(client, request("quick", 2))
        to_quick = await u.next_submit(2)
        for index in range(1, 500):
            u.send(u.tokens(to_slow, index))
        u.send(u.tokens(to_quick, 0, 2, "length"), u.ended(to_quick, "finished"))
        assert await quick.result() == expected(2)
        assert (await anext(slow)).token_ids == expected(500)[1:]
        await slow.aclose()


async def test_request_id_in_use_is_refused(client: ClusterClient, new_worker: NewWorker) -> None:
    async with new_worker("u", "unified") as u:
        first = Consumer(client, request())
        to_u = await u.next_submit()
        assert (await Consumer(client, request()).error()).code == "duplicate_request"
        u.send(u.tokens(to_u, 0, 4, "length"))
        assert await first.result() == expected(4)


async def test_prompt_goes_where_the_index_says_its_prefix_is(registry: Registry) -> None:
    options = ClusterOptions(index_timeout_s=5.0)
    async with (
        running_client(registry, options) as client,
        fake_worker(registry, "p1", "prefill", SECRET.encode()) as p1,
        fake_worker(registry, "p2", "prefill", SECRET.encode()) as p2,
        fake_worker(registry, "d", "decode", SECRET.encode()) as d,
        index_that_answers(registry, Matched([Holder(p1.ref, 1), Holder(p2.ref, 3)])),
    ):
        await until(lambda: client.workers() == {p1.ref, p2.ref, d.ref} and client.num_indexes == 1)
        for number in range(3):
            consumer = Consumer(client, request(str(number), 1))
            to_p2 = await p2.next_submit(number + 1)
            p2.send(p2.tokens(to_p2, 0, finish="length"))
            assert await consumer.result() == expected(1)
        decision = client.decision("0")
        assert decision is not None and decision.terms["prefill"] == pytest.approx(8 / 2000)
        assert p1.submits == []


async def test_burst_of_equal_prompts_lands_together(client: ClusterClient, new_worker: NewWorker) -> None:
    async with new_worker("u1", "unified") as u1, new_worker("u2", "unified") as u2:
        for number in range(4):
            consumer = Consumer(client, request(str(number), 1))
            await until(lambda: len(u1.submits) + len(u2.submits) == number + 1)  # noqa: B023
            worker = u1 if u1.submits else u2
            worker.send(worker.tokens(worker.submits[-1], 0, finish="length"))
            await consumer.result()
        assert {len(u1.submits), len(u2.submits)} == {0, 4}


async def test_load_told_over_the_session_counts_at_once(
    client: ClusterClient, new_worker: NewWorker
) -> None:
    busy = WorkerLoad(free_pages=1000, total_pages=1000, queued_tokens=100_000)
    async with new_worker("u1", "unified") as u1, new_worker("u2", "unified") as u2:
        await until(lambda: client.workers() == {u1.ref, u2.ref})
        for number, (loaded, free) in enumerate([(u1, u2), (u2, u1)]):
            loaded.tell_load(busy)
            free.tell_load(WorkerLoad(free_pages=1000, total_pages=1000))
            await until(lambda: client.load(loaded.ref) == busy and client.load(free.ref) != busy)  # noqa: B023
            consumer = Consumer(client, request(str(number), 1))
            submitted = await free.next_submit()
            free.send(free.tokens(submitted, 0, finish="length"))
            assert await consumer.result() == expected(1)


# -- losses ----------------------------------------------------------------------------------------------


async def test_broken_session_resumes_elsewhere_with_every_token_once(
    client: ClusterClient, new_worker: NewWorker
) -> None:
    async with new_worker("u1", "unified") as u1, new_worker("u2", "unified") as u2:
        consumer = Consumer(client, request(max_tokens=6))
        await until(lambda: u1.submits or u2.submits)
        bad, good = (u1, u2) if u1.submits else (u2, u1)
        bad.send(bad.tokens(bad.submits[0], 0, 3))
        await until(lambda: len(consumer.tokens) == 3)
        bad.break_session()
        again = await good.next_submit()
        assert (again.attempt, again.num_prompt_tokens, again.token_ids[200:]) == (2, 200, expected(3))
        good.send(good.tokens(again, 3, 3, "length"), good.ended(again, "finished"))
        assert await consumer.result() == expected(6)
        assert consumer.reasons == ["length"]


async def test_session_that_ends_for_good_costs_its_requests_no_error(
    client: ClusterClient, new_worker: NewWorker
) -> None:
    async with new_worker("u", "unified") as u:
        consumer = Consumer(client, request())
        await u.next_submit()
        u.break_session(code="bad_session", retryable=False)
        again = await u.next_submit(2)
        assert u.num_sessions == 2
        u.send(u.tokens(again, 0, 4, "length"))
        assert await consumer.result() == expected(4)


async def test_worker_of_another_cluster_is_not_used(
    client: ClusterClient, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    async with fake_worker(registry, "foreign", "unified", b"another secret"):
        await until(lambda: "no session yet" in caplog.text)
        assert not client.ready()
    assert caplog.text.count("no session yet") == 1 and "cluster token" in caplog.text


async def test_lost_decode_worker_aborts_prefill_and_resumes(
    client: ClusterClient, new_worker: NewWorker
) -> None:
    async with new_worker("p", "prefill") as p, new_worker("d1", "decode") as d1:
        consumer = Consumer(client, request())
        await d1.next_submit()
        async with new_worker("d2", "decode") as d2:
            d1.break_session()
            await until(lambda: p.aborts == [("r", 1)])
            to_p, to_d = await p.next_submit(2), await d2.next_submit()
            assert (to_p.attempt, to_p.peer, to_d.peer) == (2, d2.ref, p.ref)
            p.send(p.tokens(to_p, 0))
            d2.send(d2.tokens(to_d, 1, 3, "length"))
            assert await consumer.result() == expected(4)


async def test_lost_prefill_worker_is_replaced_by_local_prefill(
    client: ClusterClient, new_worker: NewWorker
) -> None:
    async with new_worker("p", "prefill") as p, new_worker("d", "decode") as d:
        consumer = Consumer(client, request())
        await p.next_submit()
        await d.next_submit()
        p.break_session()
        again = await d.next_submit(2)
        assert (again.phase, again.attempt, again.peer) == ("both", 2, None)
        assert d.aborts == [("r", 1)]
        d.send(d.tokens(again, 0, 4, "length"))
        assert await consumer.result() == expected(4)


async def test_prefill_lost_after_token_0_leaves_decode_its_chance(
    client: ClusterClient, new_worker: NewWorker
) -> None:
    async with new_worker("p", "prefill") as p, new_worker("d", "decode") as d:
        consumer = Consumer(client, request())
        to_p, to_d = await p.next_submit(), await d.next_submit()
        p.send(p.tokens(to_p, 0))
        await until(lambda: consumer.tokens == expected(1))
        p.break_session()
        await until(lambda: p.ref not in client.workers() or p.num_sessions == 2)
        d.send(d.tokens(to_d, 1, 3, "length"))
        assert await consumer.result() == expected(4)
        assert len(d.submits) == 1


async def test_decode_that_can_not_go_on_alone_is_given_up_in_time(
    client: ClusterClient, new_worker: NewWorker
) -> None:
    async with new_worker("p", "prefill") as p, new_worker("d", "decode") as d:
        consumer = Consumer(client, request())
        to_p = await p.next_submit()
        await d.next_submit()
        p.send(p.tokens(to_p, 0))
        await until(lambda: consumer.tokens == expected(1))
        p.break_session()
        again = await d.next_submit(2)  # after the grace time
        assert (again.phase, again.attempt, again.token_ids[200:]) == ("both", 2, expected(1))
        d.send(d.tokens(again, 1, 3, "length"))
        assert await consumer.result() == expected(4)


async def test_retryable_failure_goes_to_another_worker(client: ClusterClient, new_worker: NewWorker) -> None:
    async with new_worker("u1", "unified") as u1, new_worker("u2", "unified") as u2:
        consumer = Consumer(client, request())
        await until(lambda: u1.submits or u2.submits)
        bad, good = (u1, u2) if u1.submits else (u2, u1)
        bad.send(bad.ended(bad.submits[0], "failed", BUSY))
        again = await good.next_submit()
        good.send(good.tokens(again, 0, 4, "length"))
        assert await consumer.result() == expected(4)
        assert len(bad.submits) == 1


async def test_retries_are_bounded(client: ClusterClient, new_worker: NewWorker) -> None:
    async with new_worker("u", "unified") as u:
        consumer = Consumer(client, request())
        for attempt in range(1, 4):
            u.send(u.ended(await u.next_submit(attempt), "failed", BUSY))
        error = await consumer.error()
        assert (error.code, error.info.http_status, len(u.submits)) == ("queue_full", 503, 3)


async def test_failure_that_can_not_be_retried_ends_the_request(
    client: ClusterClient, new_worker: NewWorker
) -> None:
    async with new_worker("p", "prefill") as p, new_worker("d", "decode") as d:
        consumer = Consumer(client, request())
        to_d = await d.next_submit()
        bad = ErrorInfo("context_too_long", "too long", http_status=400, param="max_tokens")
        d.send(d.ended(to_d, "failed", bad))
        error = await consumer.error()
        assert error.info == bad
        await until(lambda: p.aborts == [("r", 1)])
        assert (len(p.submits), len(d.submits)) == (1, 1)


async def test_silent_worker_without_lease_is_given_up(client: ClusterClient, new_worker: NewWorker) -> None:
    async with new_worker("u1", "unified") as u1:
        consumer = Consumer(client, request())
        to_u1 = await u1.next_submit()
        u1.send(u1.tokens(to_u1, 0))
        await until(lambda: consumer.tokens == expected(1))
        async with new_worker("u2", "unified") as u2:
            await u1.stop_heartbeat()
            again = await u2.next_submit()
            assert (again.attempt, again.token_ids[200:]) == (2, expected(1))
            u2.send(u2.tokens(again, 1, 3, "length"))
            assert await consumer.result() == expected(4)


async def test_worker_without_a_lease_that_still_speaks_finishes_its_requests(
    client: ClusterClient, new_worker: NewWorker
) -> None:
    async with new_worker("u", "unified") as u:
        consumer = Consumer(client, request(max_tokens=1000))
        to_u = await u.next_submit()
        await u.stop_heartbeat()
        index = 0
        while client.model_info().num_unified_workers:
            u.send(u.tokens(to_u, index))
            index += 1
            await asyncio.sleep(0.05)
        u.send(u.tokens(to_u, index, finish="length"))
        assert await consumer.result() == expected(index + 1)
        assert len(u.submits) == 1


async def test_worker_that_drains_gets_nothing_new(
    client: ClusterClient, new_worker: NewWorker, registry: Registry
) -> None:
    async with new_worker("u1", "unified") as u1, new_worker("u2", "unified") as u2:
        await u1.stop_heartbeat()
        await u1.set_draining(registry)
        await until(lambda: client.workers() == {u2.ref})
        consumers = [Consumer(client, request(str(n), 1)) for n in range(5)]
        for n in range(5):
            to_u2 = await u2.next_submit(n + 1)
            u2.send(u2.tokens(to_u2, 0, finish="length"))
        for consumer in consumers:
            await consumer.result()
        assert u1.submits == []


async def test_redis_may_go_away_while_requests_run(
    client: ClusterClient, new_worker: NewWorker, valkey: ValkeyServer
) -> None:
    async with new_worker("u", "unified") as u:
        await u.stop_heartbeat()
        valkey.stop()
        consumer = Consumer(client, request())
        to_u = await u.next_submit()
        u.send(u.tokens(to_u, 0, 4, "length"))
        assert await consumer.result() == expected(4)
        valkey.start()


# -- bounds ----------------------------------------------------------------------------------------------


async def test_no_worker_is_a_clear_error_after_a_bounded_wait(client: ClusterClient) -> None:
    error = await Consumer(client, request()).error()
    assert (error.code, error.info.http_status) == ("no_decode_workers", 503)
    assert error.info.retry_after_s is not None
    assert not client.ready()


async def test_prefill_workers_alone_are_not_enough(client: ClusterClient, new_worker: NewWorker) -> None:
    async with new_worker("p", "prefill"):
        error = await Consumer(client, request()).error()
        assert error.code == "no_decode_workers" and "1 prefill" in str(error)


async def test_request_waits_for_a_worker_that_comes(registry: Registry) -> None:
    async with running_client(registry, ClusterOptions(worker_wait_s=10.0)) as client:
        consumer = Consumer(client, request())
        async with fake_worker(registry, "u", "unified", SECRET.encode()) as u:
            to_u = await u.next_submit()
            u.send(u.tokens(to_u, 0, 4, "length"))
            assert await consumer.result() == expected(4)


async def test_request_ends_at_its_deadline(client: ClusterClient, new_worker: NewWorker) -> None:
    async with new_worker("u", "unified") as u:
        consumer = Consumer(client, request(timeout_s=0.2))
        submit = await u.next_submit()
        assert 0 < submit.timeout_s <= 0.2
        error = await consumer.error()
        assert (error.code, error.info.http_status) == ("request_timeout", 504)
        await until(lambda: u.aborts == [("r", 1)])


# -- the cluster as a whole --------------------------------------------------------------------------------


async def test_flush_audit_and_model_info_cover_all_workers(
    client: ClusterClient, new_worker: NewWorker
) -> None:
    async with new_worker("p", "prefill") as p, new_worker("d", "decode") as d:
        assert await client.flush_cache() == 2
        assert (p.num_flushes, d.num_flushes) == (1, 1)
        assert set(await client.audit()) == {p.ref, d.ref}
        info = client.model_info()
        assert (info.model_id, info.context_length) == ("fake", 1000)
        assert (info.num_prefill_workers, info.num_decode_workers, info.num_unified_workers) == (1, 1, 0)
        assert (info.max_total_tokens, info.max_running_requests) == (16_000, 64)


async def test_front_and_engine_give_every_token_once(
    client: ClusterClient, valkey: ValkeyServer, tmp_path: Path
) -> None:
    async with (
        running_front(valkey.url, tmp_path, "prefill", worker_id="p"),
        running_front(valkey.url, tmp_path, "decode", worker_id="d"),
    ):
        await until(lambda: len(client.workers()) == 2)
        consumers = [Consumer(client, request(str(n), 20)) for n in range(32)]
        for consumer in consumers:
            assert await consumer.result() == expected(20)
        audits = {ref.worker_id: audit for ref, audit in (await client.audit()).items()}
        for ref in client.workers():
            assert client.heard(ref) <= audits[ref.worker_id].counters["steps"]
        assert all(audit.num_requests == 0 for audit in audits.values())


async def test_killed_engine_costs_a_pause_not_an_error(
    client: ClusterClient, valkey: ValkeyServer, tmp_path: Path
) -> None:
    async with (
        running_front(valkey.url, tmp_path, worker_id="u1", step_s=0.02) as u1,
        running_front(valkey.url, tmp_path, worker_id="u2", step_s=0.02) as u2,
    ):
        await until(lambda: len(client.workers()) == 2)
        consumer = Consumer(client, request(max_tokens=100))
        await until(lambda: len(consumer.tokens) >= 5)
        for front in (u1, u2):
            audit = await front.audit()
            if audit.num_requests:
                os.kill(audit.counters["pid"], signal.SIGKILL)
        assert await consumer.result() == expected(100)
