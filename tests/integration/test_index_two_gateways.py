"""Two gateways over one index: a burst of equal prompts lands together whichever it comes through.

A real Valkey, a real cache_index process, two cluster clients; workers take requests and never answer, so
that no block is ever stored and only the announcements can tell.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing

import pytest
from prometheus_client import CollectorRegistry

from benchmarks.index.stage import running_stage
from benchmarks.index.world import SECRET
from phloem.services.gateway.cluster.client import ClusterClient
from phloem.services.gateway.cluster.options import ClusterOptions
from phloem.services.gateway.generation import GenerationRequest
from phloem.shared.discovery.registry import Registry
from phloem.shared.protocol.session import PeerRef, SamplingParams
from tests.support.fake_worker import fake_worker
from tests.support.waiting import until, until_async

PROMPT = list(range(1, 4001))
NUM_WORKERS = 4
# Long enough that a busy test machine's answer is not a miss.
OPTIONS = ClusterOptions(index_timeout_s=1.0)


class Gateways:
    def __init__(self, registry: Registry, clients: list[ClusterClient]) -> None:
        self.registry = registry
        self.clients = clients

    async def route(self, gateway: int, request_id: str, token_ids: list[int]) -> PeerRef:
        """Where the gateway sends this prompt; the client goes away then."""
        client = self.clients[gateway]
        request = GenerationRequest(
            request_id=request_id, token_ids=token_ids, sampling=SamplingParams(max_tokens=4), timeout_s=30.0
        )
        async with aclosing(client.generate(request)) as generation:
            asking = asyncio.ensure_future(anext(generation))
            await until(lambda: client.decision(request_id) is not None)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        decision = client.decision(request_id)
        assert decision is not None
        return decision.prefill or decision.decode

    async def is_announced(self) -> bool:
        return bool(await self.registry.link.command("KEYS", "phloem:ix:a:*"))


@pytest.fixture
async def gateways() -> AsyncIterator[Gateways]:
    with running_stage(1, "--announce-ttl-s", "60") as stage:
        async with AsyncExitStack() as stack:
            registries = [Registry(stage.redis_url) for _ in range(3)]
            for registry in registries:
                await registry.connect(30.0, on_wait=lambda _: None)
                stack.push_async_callback(registry.close)
            for number in range(NUM_WORKERS):
                await stack.enter_async_context(fake_worker(registries[0], f"u{number}", "unified", SECRET))
            clients = [
                await stack.enter_async_context(
                    ClusterClient(registry, SECRET, f"g{number}", CollectorRegistry(), OPTIONS)
                )
                for number, registry in enumerate(registries[1:])
            ]
            for client in clients:
                await until(lambda: len(client.workers()) == NUM_WORKERS, 30.0)  # noqa: B023 - awaited at once
                await until(lambda: client.num_indexes == 1, 30.0)  # noqa: B023 - as above
            yield Gateways(registries[0], clients)


async def test_second_gateway_follows_the_first(gateways: Gateways) -> None:
    first = await gateways.route(0, "first", PROMPT)
    await until_async(gateways.is_announced)
    followers = [await gateways.route(1, f"follower {number}", PROMPT) for number in range(6)]
    assert followers == [first] * 6


async def test_prompts_that_share_a_long_prefix_follow_too_and_others_do_not(gateways: Gateways) -> None:
    first = await gateways.route(0, "first", PROMPT)
    await until_async(gateways.is_announced)
    longer = [await gateways.route(1, f"longer {n}", PROMPT + [60_000 + n] * 500) for n in range(6)]
    others = {await gateways.route(1, f"other {n}", [70_000 + n, *PROMPT]) for n in range(16)}
    assert longer == [first] * 6
    assert len(others) > 1
