"""The gateway's Prometheus metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.exposition import generate_latest

from phloem.services.gateway.histogram import LoopHistogram
from phloem.shared.telemetry.metrics import new_registry

_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_INTER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.0)


class GatewayMetrics:
    """One registry per gateway, so that several may live in one process."""

    def __init__(self) -> None:
        self.registry: CollectorRegistry = new_registry("gateway")
        self._requests = Counter(
            "phloem_gateway_requests",
            "HTTP requests answered; status 499: the client went away.",
            ("route", "status"),
            registry=self.registry,
        )
        self._requests_by: dict[tuple[str, int], Counter] = {}  # looked up faster than labels
        self.inflight_sequences = Gauge(
            "phloem_gateway_inflight_sequences", "Sequences under way.", registry=self.registry
        )
        self._time_to_first_token = self._histogram("time_to_first_token", "Arrival to first token.")
        self._inter_token = self._histogram(
            "inter_token_latency", "Time between tokens of one sequence.", _INTER_TOKEN_S
        )
        self._sequence_seconds = self._histogram("sequence", "Arrival to a sequence's last token.")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of sequences that ended.")
        self._cached_tokens = self._counter("cached_tokens", "Those of them found in a prefix cache.")
        self._generated_tokens = self._counter("generated_tokens", "Tokens generated.")

    def request_answered(self, route: str, status: int) -> None:
        counter = self._requests_by.get((route, status))
        if counter is None:
            counter = self._requests_by[route, status] = self._requests.labels(route, str(status))
        counter.inc()

    def first_token(self, seconds: float) -> None:
        self._time_to_first_token.observe(seconds)

    def tokens_followed(self, num_tokens: int, seconds: float) -> None:
        """`num_tokens` arrived together `seconds` after those before them."""
        self._inter_token.observe(seconds / num_tokens, num_tokens)

    def sequence_ended(
        self, *, seconds: float, num_prompt_tokens: int, num_cached_tokens: int, num_generated_tokens: int
    ) -> None:
        """Also one that failed or was aborted: its tokens were made all the same."""
        self._sequence_seconds.observe(seconds)
        self._prompt_tokens.inc(num_prompt_tokens)
        self._cached_tokens.inc(num_cached_tokens)
        self._generated_tokens.inc(num_generated_tokens)

    def exposition(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = _LATENCY_S) -> LoopHistogram:
        return LoopHistogram(f"phloem_gateway_{name}_seconds", text, buckets, self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"phloem_gateway_{name}", text, registry=self.registry)
