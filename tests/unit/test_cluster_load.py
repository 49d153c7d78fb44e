"""A worker's load: told over its session, or by heartbeats, and what a gateway sent since."""

from __future__ import annotations

from phloem.services.gateway.cluster.told_load import FRESH_S, ToldLoad
from phloem.services.gateway.policies.snapshot import Candidate
from phloem.shared.protocol.cluster import WorkerLoad
from tests.support.worker_records import new_record

HEARTBEAT = new_record(load=WorkerLoad(queued_tokens=7))


def test_a_told_load_outlives_older_heartbeats_and_no_newer_ones() -> None:
    told = ToldLoad()
    assert told.latest(HEARTBEAT, 100.0) == HEARTBEAT
    told.note(WorkerLoad(queued_tokens=500), 100.0)
    assert told.latest(HEARTBEAT, 100.5).load.queued_tokens == 500
    assert told.latest(HEARTBEAT, 100.0 + FRESH_S).load.queued_tokens == 7


def test_requests_whose_kv_moves_count_as_load() -> None:
    load = WorkerLoad(num_running=3, num_waiting=1, num_handing_over=2)
    record = new_record("w", "decode", load=load)
    assert Candidate(record=record, new_requests=1).num_requests == 7
