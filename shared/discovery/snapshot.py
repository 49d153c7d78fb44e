"""What a process knows about the cluster: immutable, and pure rules for how it changes."""

from __future__ import annotations

import msgspec

from phloem.shared.protocol.cluster import ServiceRecord, WorkerRecord


class ClusterSnapshot(msgspec.Struct, frozen=True):
    """The live members, as last read from Redis.

    While Redis can't be reached, `redis_ok` is False and the members are the last known ones: serving goes on
    with them (fail-open). `age_s` counts seconds since the last successful read. `generation` changes when
    Redis restarted or lost its data; members that had no time to register again are kept for one lease
    time then.
    """

    workers: tuple[WorkerRecord, ...] = ()
    services: tuple[ServiceRecord, ...] = ()
    redis_ok: bool = False
    age_s: float = 0.0
    generation: str = ""

    def worker(self, worker_id: str) -> WorkerRecord | None:
        return next((record for record in self.workers if record.worker_id == worker_id), None)


class Reading(msgspec.Struct, frozen=True):
    """One successful read of Redis. `fences` has the epochs below which a lost member is gone for good."""

    workers: dict[str, WorkerRecord]
    services: dict[str, ServiceRecord]
    fences: dict[str, int]
    generation: str


def merge(previous: ClusterSnapshot, reading: Reading, kept: Reading | None) -> ClusterSnapshot:
    """The snapshot after `reading`.

    `kept` is the last reading before Redis went away or lost its data, None when there was no such event
    within one lease time: its members stay, unless a fence says that they left.
    """
    workers = dict(reading.workers)
    services = dict(reading.services)
    if kept is not None:
        for member, worker in kept.workers.items():
            if worker.epoch >= reading.fences.get(member, 0):
                workers.setdefault(member, worker)
        for member, service in kept.services.items():
            if service.epoch >= reading.fences.get(member, 0):
                services.setdefault(member, service)
    return ClusterSnapshot(
        workers=tuple(workers[member] for member in sorted(workers)),
        services=tuple(services[member] for member in sorted(services)),
        redis_ok=True,
        age_s=0.0,
        generation=reading.generation,
    )
