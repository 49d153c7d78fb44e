"""What routing exports to Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from phloem.services.gateway.policies.snapshot import Decision
from phloem.services.gateway.route_report import RouteReport

_DECISION_BUCKETS_S = (0.000_05, 0.000_1, 0.000_2, 0.000_4, 0.000_8, 0.001_6, 0.003_2, 0.006_4, 0.025, 0.1)


class RoutingMetrics:
    """Decisions by policy and kind, the terms of those taken, and cache hits as hoped for and as achieved."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"phloem_routing_{name}", text, labels, registry=registry)

        self._decisions = counter(
            "decisions", "attempts routed; kind: pair, local prefill, unified", "policy", "kind"
        )
        self._term_seconds = counter("term_seconds", "cost of the ways chosen, policy cost", "term")
        self._decision_seconds = Histogram(
            "phloem_routing_decision_seconds",
            "time that a decision takes, without the look-up in the index",
            buckets=_DECISION_BUCKETS_S,
            registry=registry,
        )
        self._prompt_tokens = counter("prompt_tokens", "prompt tokens of requests that got a first token")
        self._achieved = counter(
            "achieved_cached_tokens", "those of them found in a cache, as workers report"
        )
        self._achievable = counter(
            "achievable_cached_tokens", "those of them that the best worker held when they were routed"
        )

    def decided(self, decision: Decision, seconds: float) -> None:
        self._decisions.labels(decision.policy, decision.kind).inc()
        self._decision_seconds.observe(seconds)
        if decision.policy == "cost":
            for term, cost_s in decision.terms.items():
                self._term_seconds.labels(term).inc(cost_s)

    def ended(self, report: RouteReport) -> None:
        """A request that had no token says nothing of the cache."""
        if report.achieved_cached_tokens is None:
            return
        self._prompt_tokens.inc(report.num_prompt_tokens)
        self._achieved.inc(report.achieved_cached_tokens)
        self._achievable.inc(max(report.achieved_cached_tokens, report.achievable_cached_tokens))
