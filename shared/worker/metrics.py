"""What a worker's front exports to Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

from phloem.shared.protocol.cluster import WorkerLoad

_LOAD_GAUGES = {
    "num_running": "requests in the running batch",
    "num_waiting": "requests that wait for a slot or pages",
    "queued_tokens": "prompt tokens accepted, not yet computed",
    "free_pages": "KV pages that are free or evictable",
    "tree_pages": "KV pages of the radix tree",
    "total_pages": "KV pages of the pool",
    "prefill_tokens_per_s": "moving average of the prefill rate",
    "decode_step_s": "moving average of the duration of a decode step",
    "transfer_bytes_per_s": "moving average of the KV transfer rate",
    "exposed_transfer_s": "moving average from token 0 to word that decode has admitted the request",
    "num_channels": "KV channels that are open",
    "staging_quarantined_bytes": "staging memory that lost KV channels have not let go of, until a restart",
}


class WorkerMetrics:
    """The front's own counts, and the engine's load as gauges."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"phloem_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"phloem_{name}", text, registry=registry)

        self.steps = counter("engine_steps_reported", "engine steps that made something")
        self.session_messages = counter(
            "session_messages",
            "messages sent to a gateway; of kind step at most one per engine step",
            "gateway",
            "kind",
        )
        self.refused = counter("requests_refused", "submissions that the front refused")
        self.sessions = gauge("sessions", "gateways connected")
        self.requests = gauge("requests_in_flight", "requests passed on to the engine and not ended")
        self.index_resyncs = counter("index_resyncs", "times that the whole tree was published")
        self.index_digests = counter(
            "index_digests", "digests compared with the index: equal, different or failed", "result"
        )
        self.index_blocks = counter("index_blocks_published", "block changes published", "change")
        self._cut_off = gauge("engine_cut_off_peers", "workers that this one can't hand KV over to now")
        self._audits = counter("engine_page_audits", "times that the pages were audited, at rest")
        self._problems = gauge("engine_page_audit_problems", "what the last audit found; 0: one owner each")
        self._load = {name: gauge(f"engine_{name}", text) for name, text in _LOAD_GAUGES.items()}

    def audited(self, num_problems: int) -> None:
        self._audits.inc()
        self._problems.set(num_problems)

    def set_load(self, load: WorkerLoad) -> None:
        for name, metric in self._load.items():
            metric.set(getattr(load, name))
        self._cut_off.set(len(load.cut_off))
