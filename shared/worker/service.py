"""The gRPC service of a worker: the session stream, and the unary calls beside it."""

from __future__ import annotations

from collections.abc import Callable

from phloem.shared.errors import PhloemError
from phloem.shared.protocol.engine import AuditReply
from phloem.shared.protocol.session import session_down, session_up
from phloem.shared.protocol.worker_rpc import (
    WORKER_SERVICE,
    AuditCall,
    Done,
    DrainRequest,
    FlushRequest,
    audit_call,
    audit_reply,
    done,
    drain_request,
    flush_request,
)
from phloem.shared.rpc.server import RpcServer
from phloem.shared.worker.engine_calls import EngineCalls
from phloem.shared.worker.sessions import Sessions


class WorkerService:
    """Answers `Session`, `Flush`, `Audit` and `Drain`; a call for another epoch is refused."""

    def __init__(self, epoch: int, sessions: Sessions, calls: EngineCalls, drain: Callable[[], None]) -> None:
        self._epoch = epoch
        self._sessions = sessions
        self._calls = calls
        self._drain = drain

    def add_to(self, server: RpcServer) -> None:
        server.add_stream(WORKER_SERVICE, "Session", session_down, session_up, self._sessions.serve)
        server.add_unary(WORKER_SERVICE, "Flush", flush_request, done, self._on_flush)
        server.add_unary(WORKER_SERVICE, "Audit", audit_call, audit_reply, self._on_audit)
        server.add_unary(WORKER_SERVICE, "Drain", drain_request, done, self._on_drain)

    async def _on_flush(self, request: FlushRequest) -> Done:
        self._check(request.epoch)
        await self._calls.flush()
        return Done()

    async def _on_audit(self, request: AuditCall) -> AuditReply:
        self._check(request.epoch)
        return await self._calls.audit()

    async def _on_drain(self, request: DrainRequest) -> Done:
        """Begins to drain, as SIGTERM does; the process exits when its requests have ended."""
        self._check(request.epoch)
        self._drain()
        return Done()

    def _check(self, epoch: int) -> None:
        if epoch != self._epoch:
            raise PhloemError(
                "stale_epoch",
                f"this worker has epoch {self._epoch}, not {epoch}",
                retryable=True,
                http_status=409,
            )
