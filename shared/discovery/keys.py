"""Names of what discovery keeps in Redis. Only this package and the sweeper's liveness check read them.

| key | type | meaning |
| --- | --- | --- |
| phloem:worker:ID, phloem:service:KIND/ID | string, PX | the lease: an encoded record |
| phloem:epoch:MEMBER | string, PX 1 h | fence: the oldest epoch that may still hold MEMBER's lease |
| phloem:members | zset | MEMBER -> expiry of its lease (unix ms); an index, the lease is the truth |
| phloem:epoch_counter | string | the last epoch given out |
| phloem:instance | string | random; gone or another one after a loss of data |
| phloem:device:HOST/INDEX | string, PX | an accelerator's claim: "EPOCH OWNER" |
| phloem:cluster_secret | string | agreed secret when none is configured |
| phloem:events | channel | "something about the members changed" |
"""

from __future__ import annotations

MEMBERS = "phloem:members"
EPOCH_COUNTER = "phloem:epoch_counter"
INSTANCE = "phloem:instance"
CLUSTER_SECRET = "phloem:cluster_secret"
EVENTS = "phloem:events"


def worker_member(worker_id: str) -> str:
    """How a worker is named in `MEMBERS` and in its keys."""
    return f"worker:{worker_id}"


def service_member(kind: str, service_id: str) -> str:
    """How a service replica is named in `MEMBERS` and in its keys."""
    return f"service:{kind}/{service_id}"


def lease(member: str) -> str:
    return f"phloem:{member}"


def fence(member: str) -> str:
    return f"phloem:epoch:{member}"


def device(host_id: str, index: int) -> str:
    return f"phloem:device:{host_id}/{index}"
