"""The seam between the HTTP side and the cluster client: tokens in, tokens out.

`phloem.services.gateway.cluster` implements `Generator`; the HTTP side knows nothing of workers, sessions
or resume. A request's life here: `generate` is called once, items are taken until one has a
`finish_reason`, or the HTTP side gives up and calls `aclose()`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from msgspec import Struct

from phloem.services.gateway.route_report import RouteReport
from phloem.shared.protocol.session import FinishReason, SamplingParams


class GenerationRequest(Struct, frozen=True, kw_only=True):
    """One sequence to generate.

    `token_ids` is the whole prompt, never empty; `sampling` is validated, its seed drawn. `cache_salt` keeps
    tenants apart in every prefix cache. `timeout_s` bounds the time from the call to the last token.
    """

    request_id: str
    token_ids: list[int]
    sampling: SamplingParams
    cache_salt: str = ""
    timeout_s: float


class GeneratedTokens(Struct, frozen=True, omit_defaults=True):
    """Tokens that became known together, in order; several when a step, or the network, made several.

    Only the last item has a `finish_reason`; its last token may be an end or stop token, which is counted
    but not shown. `num_cached_tokens` of the prompt came from a cache; `timeline` holds seconds since the
    call, by event name. Both are cumulative: an item that doesn't know more leaves them empty.
    """

    token_ids: list[int]
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    timeline: dict[str, float] = {}


class ClusterModelInfo(Struct, frozen=True, kw_only=True):
    """What the live workers serve, as they registered; all zero while none is there.

    `context_length` is the smallest of the live workers'. `max_total_tokens` is the KV pool size in tokens,
    summed over the decode and unified workers.
    """

    model_id: str = ""
    context_length: int = 0
    num_prefill_workers: int = 0
    num_decode_workers: int = 0
    num_unified_workers: int = 0
    max_total_tokens: int = 0
    max_running_requests: int = 0


class Generator(Protocol):
    """What the HTTP side asks of the cluster."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GeneratedTokens, None]:
        """Runs one request.

        Nothing is sent before the first `__anext__`. Raises `PhloemError`. `aclose()` aborts on both workers
        at once and may be called at any time, also after the end.
        """
        ...

    async def flush_cache(self) -> int:
        """Empties the prefix cache of every live worker; returns how many did so. Raises `PhloemError`."""
        ...

    def model_info(self) -> ClusterModelInfo: ...

    def route_report(self, request_id: str) -> RouteReport | None:
        """Where a recent request went and why; None when it was never routed, or is forgotten."""
        ...

    def ready(self) -> bool:
        """Whether a request that came now could be routed."""
        ...
