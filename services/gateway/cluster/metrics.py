"""What the cluster client exports to Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_LOOKUP_BUCKETS_S = (0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.02, 0.05)


class ClusterMetrics:
    """Counts of routing, retries and losses."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"phloem_cluster_{name}", text, labels, registry=registry)

        self.routed = counter("routed", "attempts submitted; kind: pair or local", "kind")
        self.retries = counter("retries", "attempts beyond a request's first", "code")
        self.failures = counter("failures", "requests that ended in an error", "code")
        self.index_misses = counter("index_misses", "look-ups that the index did not answer in time")
        self.announcements = counter(
            "announcements", "routing decisions told to other gateways: sent or dropped", "result"
        )
        self.index_lookup_seconds = Histogram(
            "phloem_cluster_index_lookup_seconds",
            "duration of look-ups in the cache index, answered or not",
            buckets=_LOOKUP_BUCKETS_S,
            registry=registry,
        )
        self.session_messages = counter("session_messages", "step messages received", "worker")
        self.sessions_lost = counter("sessions_lost", "sessions that broke", "worker")
        self.requests = Gauge("phloem_cluster_requests", "requests under way", registry=registry)
        self.workers = Gauge("phloem_cluster_workers", "live workers", ["role"], registry=registry)
