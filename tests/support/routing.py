"""Workers and requests as routing sees them."""

from __future__ import annotations

from phloem.services.gateway.policies.snapshot import Candidate, RoutingRequest
from phloem.shared.protocol.cluster import Role, WorkerLoad
from tests.support.worker_records import new_record


def worker(
    worker_id: str,
    role: Role,
    load: WorkerLoad | None = None,
    *,
    cached: int = 0,
    layout: str = "kv",
    own_requests: int = 0,
    own_prefill_tokens: int = 0,
    kv_bytes_per_token: int = 50_000,
) -> Candidate:
    """Idle, measured at 1000 prompt tokens a second, with room for 16,000, unless `load` says else."""
    record = new_record(
        worker_id,
        role,
        context_length=10_000,
        kv_layout=layout,
        kv_bytes_per_token=kv_bytes_per_token,
        max_running_requests=8,
        load=load or WorkerLoad(free_pages=1000, total_pages=1000, prefill_tokens_per_s=1000),
    )
    return Candidate(
        record=record,
        cached_tokens=cached,
        own_requests=own_requests,
        own_prefill_tokens=own_prefill_tokens,
    )


def request(
    num_tokens: int = 1000, request_id: str = "r", sequence: int = 0, num_explained: int = 0
) -> RoutingRequest:
    return RoutingRequest(
        request_id=request_id,
        num_tokens=num_tokens,
        max_new_tokens=100,
        sequence=sequence,
        num_explained=num_explained,
    )
