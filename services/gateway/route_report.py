"""What can be asked about how a request was routed."""

from __future__ import annotations

from msgspec import Struct

from phloem.services.gateway.policies.snapshot import Decision


class RoutedAttempt(Struct, frozen=True, kw_only=True):
    """`decided_in_s` is the time that the decision itself took, without the look-up in the index."""

    attempt: int
    decision: Decision
    decided_in_s: float


class RouteReport(Struct, frozen=True, kw_only=True):
    """A request's attempts, in order, and what came of the cache.

    `achievable_cached_tokens`: what the best worker held of the prompt at the first attempt, or was about to
    hold. `achieved_cached_tokens`: what the worker that prefilled found in its tree, by its own account; None
    before the first token.
    """

    request_id: str
    num_prompt_tokens: int
    attempts: list[RoutedAttempt]
    achievable_cached_tokens: int
    achieved_cached_tokens: int | None
