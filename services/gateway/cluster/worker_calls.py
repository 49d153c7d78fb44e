"""Unary calls to all workers at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from phloem.services.gateway.cluster.worker_session import WorkerSession
from phloem.shared.errors import unavailable
from phloem.shared.protocol.engine import AuditReply
from phloem.shared.protocol.session import PeerRef
from phloem.shared.protocol.worker_rpc import (
    WORKER_SERVICE,
    AuditCall,
    Done,
    FlushRequest,
    audit_call,
    audit_reply,
    done,
    flush_request,
)

CALL_TIMEOUT_S = 10.0

Answer = TypeVar("Answer")


async def flush_workers(sessions: Sequence[WorkerSession]) -> int:
    """Empties every worker's prefix cache; returns how many. Raises the first error, after all have
    answered."""

    async def flush(session: WorkerSession) -> Done:
        call = session.channel.unary(WORKER_SERVICE, "Flush", flush_request, done)
        return await call(FlushRequest(session.ref.epoch), CALL_TIMEOUT_S)

    return len(await _ask_all(sessions, flush))


async def audit_workers(sessions: Sequence[WorkerSession]) -> dict[PeerRef, AuditReply]:
    """Every worker's audit. Raises as `flush_workers` does."""

    async def audit(session: WorkerSession) -> AuditReply:
        call = session.channel.unary(WORKER_SERVICE, "Audit", audit_call, audit_reply)
        return await call(AuditCall(session.ref.epoch), CALL_TIMEOUT_S)

    answers = await _ask_all(sessions, audit)
    return {session.ref: answer for session, answer in zip(sessions, answers, strict=True)}


async def _ask_all(
    sessions: Sequence[WorkerSession], ask: Callable[[WorkerSession], Awaitable[Answer]]
) -> list[Answer]:
    answers = await asyncio.gather(*(ask(session) for session in sessions), return_exceptions=True)
    results: list[Answer] = []
    for session, answer in zip(sessions, answers, strict=True):
        if isinstance(answer, asyncio.CancelledError):  # its channel was closed beneath the call
            raise unavailable(f"worker {session.ref.worker_id} has left", code="worker_lost")
        if isinstance(answer, BaseException):
            raise answer
        results.append(answer)
    return results
