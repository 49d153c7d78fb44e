"""What a replica exports to Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_LATENCY_BUCKETS_S = (0.0002, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0)


class IndexMetrics:
    """Counts of calls and blocks, latencies, and the slots by state."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.call_seconds = Histogram(
            "phloem_index_call_seconds",
            "duration of a call that succeeded",
            ("method",),
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.errors = Counter(
            "phloem_index_errors", "calls that failed, by error code", ("method", "code"), registry=registry
        )
        self.matched_blocks = Counter(
            "phloem_index_matched_blocks", "blocks of the longest holder, over all lookups", registry=registry
        )
        self.asked_blocks = Counter(
            "phloem_index_asked_blocks", "blocks of the prompts, over all lookups", registry=registry
        )
        self.published_blocks = Counter(
            "phloem_index_published_blocks", "blocks that workers reported", ("change",), registry=registry
        )
        self.read_blocks = Counter(
            "phloem_index_read_blocks",
            "blocks that lookups read, by where they were",
            ("source",),
            registry=registry,
        )
        self.announcements = Counter(
            "phloem_index_announcements",
            "announcements of gateways, written or dropped",
            ("result",),
            registry=registry,
        )
        self.retired_slots = Counter(
            "phloem_index_retired_slots", "slots taken from dead workers by this replica", registry=registry
        )
        self.swept_slots = Counter(
            "phloem_index_swept_slots", "slots cleared by this replica", registry=registry
        )
        self.slots = Gauge("phloem_index_slots", "slots by state", ("state",), registry=registry)
