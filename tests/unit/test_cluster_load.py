"""A worker's load: told over its session, or by heartbeats, and what a gateway sent since."""

from __future__ import annotations

from phloem.services.gateway.cluster.told_load import FRESH_S, ToldLoad
from phloem.services.gateway.policies.snapshot import Candidate
from phloem.shared.protocol.cluster import WorkerLoad, WorkerRecord

HEARTBEAT = WorkerRecord(
    worker_id="w",
    epoch=1,
    role="prefill",
    rpc_address="",
    model_id="m",
    page_size=16,
    context_length=1000,
    kv_layout="k",
    load=WorkerLoad(queued_tokens=7),
)


def test_a_told_load_outlives_older_heartbeats_and_no_newer_ones() -> None:
    told = ToldLoad()
    assert told.latest(HEARTBEAT, 100.0) == HEARTBEAT
    told.note(WorkerLoad(queued_tokens=500), 100.0)
    assert told.latest(HEARTBEAT, 100.5).load.queued_tokens == 500
    assert told.latest(HEARTBEAT, 100.0 + FRESH_S).load.queued_tokens == 7


def test_requests_whose_kv_moves_count_as_load() -> None:
    load = WorkerLoad(num_running=3, num_waiting=1, num_handing_over=2)
    record = WorkerRecord(
        worker_id="w",
        epoch=1,
        role="decode",
        rpc_address="",
        model_id="m",
        page_size=16,
        context_length=1000,
        kv_layout="k",
        load=load,
    )
    assert Candidate(record=record, new_requests=1).num_requests == 7
