"""A worker whose engine is ready: listens, registers, serves, drains."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack

from phloem.shared.batch_queue import BatchQueue
from phloem.shared.discovery.registry import Registry
from phloem.shared.discovery.secret import reassert_secret
from phloem.shared.errors import PhloemError, unavailable
from phloem.shared.host_port import host_port
from phloem.shared.lifecycle.service import stop_event
from phloem.shared.protocol.cluster import Role, WorkerLoad, WorkerRecord
from phloem.shared.protocol.engine import EngineMessage, EngineReady, Stop
from phloem.shared.protocol.session import PeerRef
from phloem.shared.rpc.server import RpcServer
from phloem.shared.telemetry.metrics import MetricsServer, new_registry
from phloem.shared.worker.config import WorkerConfig
from phloem.shared.worker.engine_calls import EngineCalls
from phloem.shared.worker.engine_link import EngineLink
from phloem.shared.worker.engine_process import EngineProcess
from phloem.shared.worker.idle_audit import IdleAudit
from phloem.shared.worker.index_publisher import IndexPublisher
from phloem.shared.worker.metrics import WorkerMetrics
from phloem.shared.worker.peers import Peers
from phloem.shared.worker.registration import Registration
from phloem.shared.worker.service import WorkerService
from phloem.shared.worker.sessions import WORKER_STOPPED, Sessions

log = logging.getLogger(__name__)

# Gateways hear of a draining worker within milliseconds; what they sent before that is still served.
LAME_DUCK_S = 0.3
ENGINE_STOP_TIMEOUT_S = 10.0
RPC_STOP_GRACE_S = 0.5


class ServingWorker:
    """Wires the parts of a front together. `run` once."""

    def __init__(
        self,
        config: WorkerConfig,
        role: Role,
        me: PeerRef,
        secret: bytes,
        registry: Registry,
        engine: EngineProcess,
        ready: EngineReady,
    ) -> None:
        self._config = config
        self._role: Role = role
        self._me = me
        self._secret = secret
        self._registry = registry
        self._engine = engine
        self._ready = ready
        self._stop = stop_event()
        self._tasks = asyncio.TaskGroup()
        self._prometheus = new_registry(role)
        self._metrics = WorkerMetrics(self._prometheus)
        self._outbox: BatchQueue[EngineMessage] = BatchQueue(config.inbox_messages)
        self._calls = EngineCalls(self._outbox)
        self._sessions = Sessions(
            me, role, self._outbox, self._metrics, max_queued_messages=config.session_queue_messages
        )
        self._publisher = IndexPublisher(me, secret, self._calls.request_dump, self._metrics)

    async def run(self) -> None:
        """Serves until told to stop, then drains. Raises `PhloemError` when the engine is lost."""
        async with AsyncExitStack() as stack:
            server = RpcServer(self._secret)
            WorkerService(self._me.epoch, self._sessions, self._calls, self._stop.set).add_to(server)
            port = await server.start(self._config.host, self._config.port)
            stack.push_async_callback(server.stop, RPC_STOP_GRACE_S)
            http = await MetricsServer.start(self._prometheus, self._config.host, self._config.metrics_port)
            stack.push_async_callback(http.close)
            registration = Registration(self._registry, self._record(port), self._on_regained)
            await self._registry.connect(self._config.redis_wait_s)  # it may have gone while the model loaded
            await registration.acquire()
            stack.push_async_callback(registration.close)
            stack.callback(self._sessions.close, _stopped())
            await self._serve(registration, http.port)

    async def _serve(self, registration: Registration, metrics_port: int) -> None:
        link = EngineLink(
            self._engine,
            self._outbox,
            self._calls,
            self._sessions,
            registration,
            self._publisher,
            self._metrics,
        )
        try:
            async with self._tasks as tasks:
                sending = tasks.create_task(link.send_loop())
                others = [
                    tasks.create_task(link.receive_loop()),
                    tasks.create_task(link.watch_loop(self._config.engine_hang_timeout_s)),
                    tasks.create_task(registration.run()),
                    tasks.create_task(self._publisher.run()),
                    tasks.create_task(IdleAudit(self._calls.audit, self._sessions, self._metrics).run()),
                    tasks.create_task(self._watch_cluster(Peers(registration.record))),
                ]
                self._log_ready(registration.record, metrics_port)
                await self._stop.wait()
                await self._drain(registration)
                for task in others:
                    task.cancel()
                self._outbox.force(Stop())
                self._outbox.close()
                await sending
        except* PhloemError as errors:
            self._sessions.close(_first(errors))
            raise
        code = await self._engine.stop(ENGINE_STOP_TIMEOUT_S)
        log.info("stopped", extra={"engine_exit_code": code})

    async def _drain(self, registration: Registration) -> None:
        log.info("draining", extra={"requests": self._sessions.num_requests})
        registration.set_draining()
        await asyncio.sleep(LAME_DUCK_S)
        self._sessions.refuse(unavailable("the worker is draining", code="draining").info)
        try:
            async with asyncio.timeout(self._config.drain_timeout_s):
                await self._sessions.wait_idle()
        except TimeoutError:
            log.warning("drain timed out", extra={"requests": self._sessions.num_requests})
        await registration.close()
        self._sessions.close(_stopped())

    async def _watch_cluster(self, peers: Peers) -> None:
        async for snapshot in self._registry.watch():
            self._outbox.force_all(peers.update(snapshot))  # bounded by the number of workers
            self._publisher.set_addresses([s.address for s in snapshot.services if s.kind == "cache_index"])

    def _on_regained(self) -> None:
        self._publisher.resync()
        if not self._config.cluster_secret:
            self._tasks.create_task(self._reassert_secret())

    async def _reassert_secret(self) -> None:
        try:
            await reassert_secret(self._registry, self._secret)
        except PhloemError as error:
            log.warning("the cluster's secret was not put back into Redis: %s", error)

    def _record(self, port: int) -> WorkerRecord:
        ready = self._ready
        return WorkerRecord(
            worker_id=self._me.worker_id,
            epoch=self._me.epoch,
            role=self._role,
            rpc_address=host_port(self._config.advertise_host or self._config.host, port),
            model_id=self._config.engine.model_path.rstrip("/").rpartition("/")[2],
            page_size=ready.page_size,
            context_length=ready.context_length,
            kv_layout=ready.kv_layout,
            kv_bytes_per_token=ready.kv_bytes_per_token,
            transfer_address=ready.transfer_address,
            device=ready.device,
            max_running_requests=ready.max_running_requests,
            load=WorkerLoad(free_pages=ready.num_pages, total_pages=ready.num_pages),
        )

    def _log_ready(self, record: WorkerRecord, metrics_port: int) -> None:
        log.info(
            "ready",
            extra={
                "worker": record.worker_id,
                "role": record.role,
                "epoch": record.epoch,
                "rpc": record.rpc_address,
                "metrics_port": metrics_port,
                "device": record.device,
                "pages": self._ready.num_pages,
                "engine_pid": self._engine.pid,
            },
        )


def _stopped() -> PhloemError:
    return unavailable("the worker has stopped", code=WORKER_STOPPED)


def _first(errors: BaseExceptionGroup[PhloemError]) -> PhloemError:
    for error in errors.exceptions:
        return _first(error) if isinstance(error, BaseExceptionGroup) else error
    raise AssertionError("an exception group is never empty")
