"""The cluster client with real fronts over fake engines: real gRPC, a real Valkey."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from prometheus_client import CollectorRegistry

from phloem.services.gateway.cluster.client import ClusterClient
from phloem.services.gateway.cluster.options import ClusterOptions
from phloem.services.gateway.generation import GenerationRequest
from phloem.shared.discovery.registry import Registry
from phloem.shared.protocol.session import SamplingParams
from tests.support.fake_engine import FIRST_TOKEN
from tests.support.valkey import ValkeyServer
from tests.support.waiting import until
from tests.support.worker_front import SECRET, running_front


@asynccontextmanager
async def running_client(
    redis_url: str, options: ClusterOptions | None = None
) -> AsyncIterator[ClusterClient]:
    registry = Registry(redis_url)
    try:
        async with ClusterClient(registry, SECRET.encode(), "g1", CollectorRegistry(), options) as client:
            yield client
            assert client.is_idle
    finally:
        await registry.close()


def request(request_id: str, max_tokens: int = 4, num_tokens: int = 100) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id,
        token_ids=list(range(1, num_tokens + 1)),
        sampling=SamplingParams(max_tokens=max_tokens),
        timeout_s=30.0,
    )


async def tokens_of(client: ClusterClient, wanted: GenerationRequest) -> list[int]:
    tokens: list[int] = []
    async for item in client.generate(wanted):
        tokens += item.token_ids
    return tokens


def expected(max_tokens: int) -> list[int]:
    return [FIRST_TOKEN + index for index in range(max_tokens)]


async def test_pair_of_workers_gives_every_token_once_in_order(valkey: ValkeyServer, tmp_path: Path) -> None:
    async with (
        running_front(valkey.url, tmp_path, "prefill", worker_id="p"),
        running_front(valkey.url, tmp_path, "decode", worker_id="d"),
        running_client(valkey.url) as client,
    ):
        await until(lambda: client.model_info().num_prefill_workers == 1 and client.ready())
        assert await tokens_of(client, request("r", 8)) == expected(8)
        decision = client.decision("r")
        assert decision is not None and decision.prefill is not None
        assert (decision.prefill.worker_id, decision.decode.worker_id) == ("p", "d")
