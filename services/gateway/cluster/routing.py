"""Where a request goes: the door to the policies."""

from __future__ import annotations

from collections.abc import Sequence

from phloem.services.gateway.policies import simple
from phloem.services.gateway.policies.cache_aware import cache_aware
from phloem.services.gateway.policies.cost import choose_cheapest
from phloem.services.gateway.policies.scores import choose_by_scores
from phloem.services.gateway.policies.snapshot import Candidate, Decision, RoutingPolicy, RoutingRequest

__all__ = ["Candidate", "Decision", "RoutingPolicy", "RoutingRequest", "route"]


def route(policy: RoutingPolicy, request: RoutingRequest, candidates: Sequence[Candidate]) -> Decision | None:
    """The decision, or None when no worker can decode. Pure: the same arguments give the same decision, in
    whatever order the candidates come."""
    match policy:
        case "cost":
            return choose_cheapest(request, candidates)
        case "prefix":
            return choose_by_scores(policy, simple.prefix, request, candidates)
        case "least_loaded":
            return choose_by_scores(policy, simple.least_loaded, request, candidates)
        case "round_robin":
            return choose_by_scores(policy, simple.round_robin, request, candidates)
        case "random":
            return choose_by_scores(policy, simple.random, request, candidates)
        case "cache_aware":
            return choose_by_scores(policy, cache_aware, request, candidates)
