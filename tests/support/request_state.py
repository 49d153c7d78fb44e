"""A request's state without workers, and what they would say."""

from __future__ import annotations

from phloem.services.gateway.cluster.request import RequestState
from phloem.services.gateway.generation import GenerationRequest
from phloem.shared.errors import ErrorInfo
from phloem.shared.protocol.session import (
    Ended,
    EndReason,
    FinishReason,
    PeerRef,
    SamplingParams,
    TokensOut,
)

P, D, U = PeerRef("p", 1), PeerRef("d", 1), PeerRef("u", 1)
LOST = ErrorInfo("session_broken", "broken", retryable=True, http_status=503)


def new_state(max_tokens: int = 4) -> RequestState:
    return RequestState(
        GenerationRequest(
            request_id="r",
            token_ids=[1, 2, 3],
            sampling=SamplingParams(max_tokens=max_tokens),
            cache_salt="salt",
            timeout_s=10.0,
        )
    )


def pair_state(max_tokens: int = 4) -> RequestState:
    """After the submissions to P and D."""
    state = new_state(max_tokens)
    state.begin({D: "decode", P: "prefill"}, [], 0.0)
    return state


def tokens(
    start: int, count: int = 1, finish: FinishReason | None = None, *, attempt: int = 1, cached: int = 0
) -> TokensOut:
    """Tokens [start, start + count); each is 100 + its index."""
    ids = [100 + index for index in range(start, start + count)]
    return TokensOut("r", attempt, start, ids, finish, cached, {"first_token": 0.5})


def ended(reason: EndReason, error: ErrorInfo | None = None, *, attempt: int = 1) -> Ended:
    return Ended("r", attempt, reason, error)


def waits(state: RequestState) -> bool:
    """Whether the attempt goes on, with one worker that must show a sign of life."""
    return state.in_grace and state.failure is None
