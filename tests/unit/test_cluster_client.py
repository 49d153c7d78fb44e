"""The cluster client against scripted workers and real fronts: real gRPC, a real Valkey."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from phloem.services.gateway.cluster.client import ClusterClient
from phloem.services.gateway.cluster.options import ClusterOptions
from phloem.shared.discovery.lease import LeaseKeeper, ServiceLease
from phloem.shared.discovery.registry import Registry
from phloem.shared.protocol.cluster import ServiceRecord, WorkerLoad
from phloem.shared.protocol.index import Holder, Matched
from tests.support.cluster_client import Consumer, NewWorker, expected, request, running_client
from tests.support.fake_index import FakeIndex
from tests.support.fake_worker import fake_worker
from tests.support.valkey import ValkeyServer
from tests.support.waiting import until
from tests.support.worker_front import SECRET, running_front


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
