"""What a gateway's requests do when workers break, fail, fall silent, drain, or Redis goes away."""

from __future__ import annotations

import asyncio

import pytest

from phloem.services.gateway.cluster.client import ClusterClient
from phloem.shared.discovery.registry import Registry
from phloem.shared.errors import ErrorInfo
from tests.support.cluster_client import Consumer, NewWorker, expected, request
from tests.support.fake_worker import fake_worker
from tests.support.valkey import ValkeyServer
from tests.support.waiting import until

BUSY = ErrorInfo("queue_full", "the queue is full", retryable=True, http_status=503)


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


async def test_a_request_that_nobody_takes_over_says_what_happened_and_what_is_missing(
    client: ClusterClient, new_worker: NewWorker
) -> None:
    async with new_worker("u", "unified") as u:
        consumer = Consumer(client, request())
        submit = await u.next_submit()
        u.send(u.tokens(submit, 0, 2))
        await until(lambda: len(consumer.tokens) == 2)
    error = await consumer.error()
    assert error.retryable
    assert "no other could go on with the request: the cluster has no decode or unified" in str(error)
    assert "`phloem serve decode`" in str(error)


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
