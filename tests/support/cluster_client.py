"""A gateway's cluster client over scripted workers, and requests that a test follows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TypeAlias

from prometheus_client import CollectorRegistry

from phloem.services.gateway.cluster.client import ClusterClient
from phloem.services.gateway.cluster.options import ClusterOptions
from phloem.services.gateway.generation import GeneratedTokens, GenerationRequest
from phloem.shared.discovery.registry import Registry
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.cluster import Role
from phloem.shared.protocol.session import SamplingParams
from tests.support.fake_worker import FIRST_TOKEN, FakeWorker
from tests.support.worker_front import SECRET

NewWorker: TypeAlias = Callable[[str, Role], AbstractAsyncContextManager[FakeWorker]]
QUICK = ClusterOptions(worker_wait_s=0.3, handover_grace_s=0.3, worker_silence_s=0.2)


@asynccontextmanager
async def running_client(registry: Registry, options: ClusterOptions = QUICK) -> AsyncIterator[ClusterClient]:
    """A client that has left nothing behind when the test is over."""
    async with ClusterClient(registry, SECRET.encode(), "g1", CollectorRegistry(), options) as client:
        yield client
        assert client.is_idle


def request(request_id: str = "r", max_tokens: int = 4, timeout_s: float = 30.0) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id,
        token_ids=list(range(1, 201)),
        sampling=SamplingParams(max_tokens=max_tokens),
        timeout_s=timeout_s,
    )


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
