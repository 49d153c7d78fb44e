"""The gateway's door to the cluster: routes requests, merges what workers send, survives their loss."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from types import TracebackType

from prometheus_client import CollectorRegistry

from phloem.services.gateway.cluster.index_client import IndexClient
from phloem.services.gateway.cluster.live_request import LiveRequest
from phloem.services.gateway.cluster.membership import Membership
from phloem.services.gateway.cluster.metrics import ClusterMetrics
from phloem.services.gateway.cluster.options import ClusterOptions
from phloem.services.gateway.cluster.request_table import RequestTable
from phloem.services.gateway.cluster.router import Router
from phloem.services.gateway.cluster.routing import Decision
from phloem.services.gateway.cluster.routing_metrics import RoutingMetrics
from phloem.services.gateway.cluster.worker_calls import audit_workers, flush_workers
from phloem.services.gateway.cluster.worker_session import WorkerSession
from phloem.services.gateway.generation import ClusterModelInfo, GeneratedTokens, GenerationRequest
from phloem.services.gateway.route_report import RouteReport
from phloem.shared.block_hash import BlockHasher
from phloem.shared.discovery.registry import Registry
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.cluster import WorkerLoad, WorkerRecord
from phloem.shared.protocol.engine import AuditReply
from phloem.shared.protocol.session import PeerRef, Phase

log = logging.getLogger(__name__)

# The workers live and had no room: such an attempt doesn't count; the request's own deadline bounds it.
_NOBODY_DIED = frozenset({"handover_no_room", "handover_timeout"})


class ClusterClient:
    """Implements `Generator`. Use as an async context manager; it serves between enter and exit.

    One per gateway process: it holds one session with each worker. The registry stays the caller's.
    """

    def __init__(
        self,
        registry: Registry,
        cluster_secret: bytes,
        gateway_id: str,
        prometheus: CollectorRegistry,
        options: ClusterOptions | None = None,
    ) -> None:
        self._registry = registry
        self._cluster_secret = cluster_secret
        self._gateway_id = gateway_id
        self._options = options or ClusterOptions()
        self._metrics = ClusterMetrics(prometheus)
        self._hasher = BlockHasher(cluster_secret)
        self._index = IndexClient(cluster_secret, self._options.index_timeout_s, self._metrics)
        self._membership = Membership(
            self._new_session,
            lambda worker: self._table.num_requests(worker) > 0,
            self._metrics,
            silence_s=self._options.worker_silence_s,
        )
        self._table = RequestTable(self._membership.session)
        self._router = Router(
            self._options, self._membership, self._table, self._index, RoutingMetrics(prometheus)
        )
        self._sequence = 0
        self._tasks = asyncio.TaskGroup()
        self._following: asyncio.Task[None] | None = None

    async def __aenter__(self) -> ClusterClient:
        await self._tasks.__aenter__()
        self._following = self._tasks.create_task(self._follow_cluster(), name="cluster membership")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._following is not None
        self._following.cancel()
        self._membership.close()
        await self._tasks.__aexit__(kind, error, trace)
        await self._index.close()

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way and none has left anything behind."""
        return self._table.is_empty

    def ready(self) -> bool:
        """Whether a request that came now could be routed."""
        return any(session.record.role != "prefill" for session in self._membership.routable)

    def model_info(self) -> ClusterModelInfo:
        records = [session.record for session in self._membership.live]
        if not records:
            return ClusterModelInfo()
        decoders = [record for record in records if record.role != "prefill"]
        return ClusterModelInfo(
            model_id=records[0].model_id,
            context_length=min(record.context_length for record in records),
            num_prefill_workers=sum(record.role == "prefill" for record in records),
            num_decode_workers=sum(record.role == "decode" for record in records),
            num_unified_workers=sum(record.role == "unified" for record in records),
            max_total_tokens=sum(record.load.total_pages * record.page_size for record in decoders),
            max_running_requests=sum(record.max_running_requests for record in decoders),
        )

    def workers(self) -> set[PeerRef]:
        """Workers that take new requests now."""
        return {session.ref for session in self._membership.routable}

    @property
    def num_indexes(self) -> int:
        """Live cache index replicas."""
        return self._index.num_replicas

    def load(self, worker: PeerRef) -> WorkerLoad | None:
        """A worker's load, as it told it last."""
        session = self._membership.session(worker)
        return session.record.load if session is not None else None

    def heard(self, worker: PeerRef) -> int:
        """Step messages that came from this worker."""
        session = self._membership.session(worker)
        return session.num_messages if session is not None else 0

    def decision(self, request_id: str) -> Decision | None:
        """Where a recent request went last, and the terms of its cost."""
        return self._router.decision(request_id)

    def route_report(self, request_id: str) -> RouteReport | None:
        """See `Generator.route_report`."""
        return self._router.report(request_id)

    async def flush_cache(self) -> int:
        """Empties the prefix cache of every live worker; returns how many. Raises `PhloemError`."""
        return await flush_workers(self._membership.live)

    async def audit(self) -> dict[PeerRef, AuditReply]:
        """Who owns the pages of each live worker. Raises `PhloemError`."""
        return await audit_workers(self._membership.live)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GeneratedTokens, None]:
        """See `Generator.generate`."""
        self._sequence += 1
        live = LiveRequest(request, self._sequence)
        self._table.add(live)
        self._metrics.requests.set(len(self._table))
        try:
            await self._start_attempt(live)
            while True:
                item = live.state.take()
                if item is not None:
                    yield item
                    if item.finish_reason is not None:
                        return
                elif live.state.failure is not None:
                    self._check_may_retry(live)
                    await self._start_attempt(live)
                else:
                    await live.news(self._options.handover_grace_s)
                    if live.check_limits():
                        self._table.settle(live)
        except PhloemError as error:
            self._metrics.failures.labels(error.code).inc()
            raise
        finally:
            self._router.ended(live)
            self._table.remove(live)
            self._metrics.requests.set(len(self._table))

    # -- one attempt -----------------------------------------------------------------------------------

    async def _start_attempt(self, live: LiveRequest) -> None:
        state = live.state
        live.block_hashes = self._hasher.chain(
            state.token_ids, state.request.cache_salt, known=live.block_hashes
        )
        decision, num_prefill_tokens = await self._router.place(live)
        submits = state.begin(_phases(decision), live.block_hashes, live.elapsed_s)
        self._table.submit(live, submits, (decision.prefill or decision.decode, num_prefill_tokens))
        self._metrics.routed.labels("pair" if decision.prefill else "local").inc()

    def _check_may_retry(self, live: LiveRequest) -> None:
        """Raises the failure when it is final."""
        failure = live.state.failure
        assert failure is not None
        error = PhloemError.from_info(failure.error)
        live.num_losses += error.code not in _NOBODY_DIED
        if not error.retryable or live.num_losses >= self._options.max_attempts:
            raise error
        if failure.avoid is not None:
            live.avoid.add(failure.avoid)
        self._metrics.retries.labels(error.code).inc()
        log.info(
            "request is submitted again: %s",
            error,
            extra={"request_id": live.state.request.request_id, "attempt": live.state.attempt + 1},
        )

    # -- the cluster -----------------------------------------------------------------------------------

    async def _follow_cluster(self) -> None:
        async for snapshot in self._registry.watch():
            self._membership.update(snapshot, self._tasks)
            await self._index.set_addresses(
                [service.address for service in snapshot.services if service.kind == "cache_index"]
            )
            self._router.on_change()

    def _new_session(self, record: WorkerRecord) -> WorkerSession:
        return WorkerSession(
            record,
            self._gateway_id,
            self._cluster_secret,
            self._options,
            self._metrics,
            on_step=self._table.on_step,
            on_load=self._table.on_load,
            on_lost=self._table.on_lost,
            on_change=self._router.on_change,
        )


def _phases(decision: Decision) -> dict[PeerRef, Phase]:
    """Decode first: it reserves pages while prefill computes."""
    if decision.prefill is None:
        return {decision.decode: "both"}
    return {decision.decode: "decode", decision.prefill: "prefill"}
