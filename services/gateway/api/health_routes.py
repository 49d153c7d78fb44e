"""Health and metrics."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from litestar import MediaType, Response, get
from litestar.types import ASGIApp
from msgspec import Struct
from msgspec.json import encode
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from phloem.services.gateway.api.access import call_of
from phloem.services.gateway.api.auth import PUBLIC
from phloem.services.gateway.api.errors import HttpRequest
from phloem.services.gateway.api.exchange import Exchange, Reply
from phloem.services.gateway.api.operations import gateway_of
from phloem.services.gateway.gateway import Gateway
from phloem.services.gateway.generation import GenerationRequest
from phloem.shared.errors import unavailable
from phloem.shared.protocol.session import SamplingParams

_METRICS_TYPE = CONTENT_TYPE_LATEST.removesuffix("; charset=utf-8")  # Litestar adds it


class Health(Struct, frozen=True):
    status: str = "ok"


@get("/health", opt=PUBLIC, summary="Whether this process is alive", sync_to_thread=False)
def health() -> Health:
    return Health()


@get("/health_generate", summary="Whether a token goes through the whole cluster")
async def health_generate(request: HttpRequest) -> ASGIApp:
    gateway, call = gateway_of(request), call_of(request.scope)

    async def work(reply: Reply) -> None:
        with gateway.admission.admit(call.tenant.id, 1):
            await _generate_one(gateway, call.request_id)
        await reply.json(encode(Health()))

    return Exchange(work)


@get("/metrics", summary="Prometheus metrics", media_type=MediaType.TEXT)
async def metrics(request: HttpRequest) -> Response[bytes]:
    return Response(gateway_of(request).metrics.exposition(), media_type=_METRICS_TYPE)


async def _generate_one(gateway: Gateway, request_id: str) -> None:
    """Raises `PhloemError` (503) unless the cluster generates a token within the deadline."""
    timeout_s = gateway.config.health_generate_timeout_s
    probe = GenerationRequest(
        request_id=request_id,
        token_ids=[0],
        sampling=SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True),
        # Never anybody's prefix, and not the cache's answer from the last time.
        cache_salt=request_id,
        timeout_s=timeout_s,
    )
    try:
        async with asyncio.timeout(timeout_s), aclosing(gateway.generator.generate(probe)) as arrivals:
            async for arrival in arrivals:
                if arrival.token_ids:
                    return
    except TimeoutError as error:
        raise unavailable(
            f"no token came through the cluster within {timeout_s:g} s", code="unhealthy"
        ) from error
    raise unavailable("the cluster ended the probe without a token", code="unhealthy")
