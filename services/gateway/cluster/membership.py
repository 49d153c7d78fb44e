"""The workers of the cluster as this gateway knows them: one session with each, kept while it lives."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable

from phloem.services.gateway.cluster.metrics import ClusterMetrics
from phloem.services.gateway.cluster.worker_session import WorkerSession
from phloem.shared.discovery.snapshot import ClusterSnapshot
from phloem.shared.errors import unavailable
from phloem.shared.protocol.cluster import WorkerRecord
from phloem.shared.protocol.session import PeerRef

log = logging.getLogger(__name__)


class Membership:
    """Owns the sessions: opens one for each worker that registers, closes those of workers that left.

    A worker whose lease is gone is routed to no more. What runs there goes on while it is heard; after
    `silence_s` without a word its requests are given up. (While Redis is away snapshots keep their members.)
    """

    def __init__(
        self,
        new_session: Callable[[WorkerRecord], WorkerSession],
        is_busy: Callable[[PeerRef], bool],
        metrics: ClusterMetrics,
        *,
        silence_s: float,
    ) -> None:
        self._new_session = new_session
        self._is_busy = is_busy
        self._metrics = metrics
        self._silence_s = silence_s
        self._sessions: dict[PeerRef, WorkerSession] = {}
        self._runs: dict[PeerRef, asyncio.Task[None]] = {}
        self._live: set[PeerRef] = set()

    def session(self, worker: PeerRef) -> WorkerSession | None:
        return self._sessions.get(worker)

    @property
    def live(self) -> list[WorkerSession]:
        """Sessions, up or not, of the workers whose lease is held."""
        return [self._sessions[ref] for ref in self._live]

    @property
    def routable(self) -> list[WorkerSession]:
        """Workers that take new requests now."""
        return [session for session in self.live if session.up and session.record.state == "ready"]

    def update(self, snapshot: ClusterSnapshot, tasks: asyncio.TaskGroup) -> None:
        """Follows the cluster; sessions run in `tasks`."""
        records = {PeerRef(record.worker_id, record.epoch): record for record in snapshot.workers}
        for ref, record in records.items():
            session = self._sessions.get(ref)
            if session is not None:
                session.renew(record)
            else:
                self._add(ref, record, tasks)
        self._live = set(records)
        for ref in [known for known in self._sessions if known not in records]:
            self._retire(ref)
        self._count(snapshot)

    def close(self) -> None:
        """Ends all sessions; their tasks end soon after."""
        for run in self._runs.values():
            run.cancel()

    def _add(self, ref: PeerRef, record: WorkerRecord, tasks: asyncio.TaskGroup) -> None:
        log.info("worker joined", extra={"worker": ref.worker_id, "epoch": ref.epoch, "role": record.role})
        session = self._sessions[ref] = self._new_session(record)
        self._runs[ref] = tasks.create_task(session.run(), name=f"session {ref.worker_id}")

    def _retire(self, ref: PeerRef) -> None:
        session = self._sessions[ref]
        if session.up and self._is_busy(ref):
            if time.monotonic() - session.heard_at <= self._silence_s:
                return  # deregistered or cut off from Redis, but it still works for us
            message = f"worker {ref.worker_id} lost its lease and is silent"
            session.lose(unavailable(message, code="worker_lost"))
        log.info("worker left", extra={"worker": ref.worker_id, "epoch": ref.epoch})
        del self._sessions[ref]
        self._runs.pop(ref).cancel()

    def _count(self, snapshot: ClusterSnapshot) -> None:
        roles = Counter(record.role for record in snapshot.workers)
        for role in ("prefill", "decode", "unified"):
            self._metrics.workers.labels(role).set(roles[role])
