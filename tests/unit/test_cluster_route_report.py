"""What the cluster client keeps and exports of its decisions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from phloem.services.gateway.cluster.client import ClusterClient
from phloem.services.gateway.cluster.options import ClusterOptions
from phloem.services.gateway.cluster.request import RequestState
from phloem.services.gateway.cluster.route_log import MAX_ATTEMPTS, RouteLog
from phloem.services.gateway.cluster.routing import Decision
from phloem.services.gateway.generation import GeneratedTokens, GenerationRequest
from phloem.shared.discovery.registry import Registry
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.session import PeerRef, SamplingParams
from tests.support.fake_worker import fake_worker
from tests.support.waiting import until

SECRET = b"secret"
OPTIONS = ClusterOptions(worker_wait_s=0.2)
PROMPT_TOKENS = 200


def generation(request_id: str) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id,
        token_ids=list(range(PROMPT_TOKENS)),
        sampling=SamplingParams(max_tokens=1),
        timeout_s=30.0,
    )


def sample(metrics: CollectorRegistry, name: str, **labels: str) -> float:
    return metrics.get_sample_value(f"phloem_routing_{name}", labels) or 0.0


async def first_of(tokens: AsyncGenerator[GeneratedTokens, None]) -> GeneratedTokens:
    async with aclosing(tokens):
        return await anext(tokens)


async def test_report_and_metrics_tell_decision_and_hits(registry: Registry) -> None:
    metrics = CollectorRegistry()
    async with (
        ClusterClient(registry, SECRET, "g", metrics, OPTIONS) as client,
        fake_worker(registry, "u", "unified", SECRET) as worker,
    ):
        await until(lambda: worker.ref in client.workers())
        for number, cached in enumerate((0, 128)):
            tokens = client.generate(generation(f"r{number}"))
            async with aclosing(tokens):
                arriving = asyncio.ensure_future(anext(tokens))
                submit = await worker.next_submit(number + 1)
                early = client.route_report(f"r{number}")
                assert early is not None and early.achieved_cached_tokens is None
                made = worker.tokens(submit, 0, finish="length")
                worker.send(msgspec.structs.replace(made, num_cached_tokens=cached))
                await arriving
        report = client.route_report("r1")
    assert report is not None and len(report.attempts) == 1
    decision = report.attempts[0].decision
    assert (decision.kind, decision.decode.worker_id, decision.policy) == ("unified", "u", "cost")
    assert (report.num_prompt_tokens, report.achieved_cached_tokens) == (PROMPT_TOKENS, 128)
    assert report.achievable_cached_tokens == 192  # three blocks that this gateway sent there before
    assert [ranking.part for ranking in decision.rankings] == ["prefill", "decode", "both"]
    assert sample(metrics, "decisions_total", policy="cost", kind="unified") == 2
    assert sample(metrics, "decision_seconds_count") == 2
    assert sample(metrics, "term_seconds_total", term="prefill") > 0
    assert sample(metrics, "prompt_tokens_total") == 2 * PROMPT_TOKENS
    assert sample(metrics, "achieved_cached_tokens_total") == 128
    assert sample(metrics, "achievable_cached_tokens_total") == 192


@pytest.mark.parametrize(
    ("threshold", "compared"), [(0.0, "decode_lacking_tokens"), (1.0, "decode_tree_tokens")]
)
async def test_flags_reach_the_policy(registry: Registry, threshold: float, compared: str) -> None:
    options = ClusterOptions(routing_policy="cache_aware", cache_threshold=threshold)
    async with (
        ClusterClient(registry, SECRET, "g", CollectorRegistry(), options) as client,
        fake_worker(registry, "u", "unified", SECRET) as worker,
    ):
        await until(lambda: worker.ref in client.workers())
        for number in range(2):
            arriving = asyncio.ensure_future(first_of(client.generate(generation(f"r{number}"))))
            worker.send(worker.tokens(await worker.next_submit(number + 1), 0, finish="length"))
            await arriving
        decision = client.decision("r1")
    assert decision is not None and decision.policy == "cache_aware"
    assert list(decision.terms) == [compared]


async def test_request_without_a_worker_leaves_no_report(registry: Registry) -> None:
    metrics = CollectorRegistry()
    async with ClusterClient(registry, SECRET, "g", metrics, OPTIONS) as client:
        with pytest.raises(PhloemError, match=r"^the cluster has no decode"):
            await first_of(client.generate(generation("r")))
        assert client.route_report("r") is None
    assert sample(metrics, "prompt_tokens_total") == 0


def decision_for(worker_id: str) -> Decision:
    return Decision(decode=PeerRef(worker_id, 1), kind="unified", policy="cost", terms={"prefill": 1.0})


def test_log_forgets_the_oldest_requests() -> None:
    log = RouteLog(max_requests=2)
    states = [RequestState(generation(name)) for name in "abc"]
    for state in states:
        log.note(state, decision_for("u"), 0.001)
    assert log.report("a") is None and log.ended(states[0]) is None
    assert log.report("b") is not None and log.decision("c") is not None


def test_log_keeps_the_first_and_the_last_attempts() -> None:
    log, state = RouteLog(), RequestState(generation("a"))
    for number in range(MAX_ATTEMPTS + 5):
        state.attempt = number
        log.note(state, decision_for(f"u{number}"), 0.001)
    report = log.report("a")
    assert report is not None
    assert [attempt.attempt for attempt in report.attempts] == [1, *range(7, MAX_ATTEMPTS + 6)]
