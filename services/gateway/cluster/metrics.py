"""What the cluster client exports to Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge


class ClusterMetrics:
    """Counts of routing, retries and losses."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"phloem_cluster_{name}", text, labels, registry=registry)

        self.routed = counter("routed", "attempts submitted; kind: pair or local", "kind")
        self.retries = counter("retries", "attempts beyond a request's first", "code")
        self.failures = counter("failures", "requests that ended in an error", "code")
        self.index_misses = counter("index_misses", "look-ups that the index did not answer in time")
        self.session_messages = counter("session_messages", "step messages received", "worker")
        self.sessions_lost = counter("sessions_lost", "sessions that broke", "worker")
        self.requests = Gauge("phloem_cluster_requests", "requests under way", registry=registry)
        self.workers = Gauge("phloem_cluster_workers", "live workers", ["role"], registry=registry)
