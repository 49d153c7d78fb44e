"""All gateways' sessions with this worker, and the way of their requests to the engine and back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

from phloem.shared.batch_queue import BatchQueue
from phloem.shared.errors import ErrorInfo, PhloemError, invalid_request
from phloem.shared.protocol.cluster import Role, WorkerLoad
from phloem.shared.protocol.engine import AbortGateway, EngineAbort, EngineMessage, EngineSubmit, StepReport
from phloem.shared.protocol.session import (
    PROTOCOL_VERSION,
    Abort,
    Ended,
    Hello,
    Output,
    PeerRef,
    SessionDown,
    SessionUp,
    Submit,
    Welcome,
)
from phloem.shared.worker.gateway_session import GatewaySession
from phloem.shared.worker.metrics import WorkerMetrics

log = logging.getLogger(__name__)

WORKER_STOPPED = "worker_stopped"  # as it was told to
HELLO_TIMEOUT_S = 5.0


class Sessions:
    """Owns the sessions and knows whose each request is.

    Down: requests go into `outbox`, which is sent to the engine. Up: `deliver` makes exactly one
    `StepMessage` per session out of each engine step. A session that ends takes its requests with it.
    """

    def __init__(
        self,
        worker: PeerRef,
        role: Role,
        outbox: BatchQueue[EngineMessage],
        metrics: WorkerMetrics,
        *,
        max_queued_messages: int,
    ) -> None:
        self._worker = worker
        self._role = role
        self._outbox = outbox
        self._metrics = metrics
        self._max_queued_messages = max_queued_messages
        self._sessions: dict[int, GatewaySession] = {}
        self._next_number = 1
        self._num_requests = 0
        self._num_taken = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._refusal: ErrorInfo | None = None

    @property
    def num_requests(self) -> int:
        """Requests that were passed on to the engine and have not ended."""
        return self._num_requests

    @property
    def num_taken(self) -> int:
        """Requests that were ever passed on to the engine."""
        return self._num_taken

    async def wait_idle(self) -> None:
        """Returns when no request is in flight."""
        await self._idle.wait()

    def refuse(self, error: ErrorInfo) -> None:
        """From now on every Submit ends at once with `error`; requests in flight go on."""
        self._refusal = error

    def close(self, error: PhloemError) -> None:
        """Ends every session with `error`, and those that come later at once."""
        self.refuse(error.info)
        for session in list(self._sessions.values()):
            self._end(session, error)

    async def serve(self, messages: AsyncIterator[SessionDown]) -> AsyncIterator[SessionUp]:
        """One session, from Hello to the end of either side's stream."""
        session = self._open(await self._hello(messages))
        reader = asyncio.create_task(self._read(session, messages), name=f"session {session.gateway_id}")
        try:
            yield Welcome(self._worker.worker_id, self._worker.epoch, self._role)
            while batch := await session.next_messages():
                for message in batch:
                    yield message
        finally:
            self._forget(session)
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    def deliver(self, report: StepReport) -> None:
        """Sends what one engine step made, in one message per gateway."""
        self._metrics.steps.inc()
        for part in report.outputs:
            session = self._sessions.get(part.gateway)
            if session is not None and part.outputs:
                self._settle(session, part.outputs)
                self._send(session, report.step, part.outputs, "step")

    def tell_load(self, load: WorkerLoad) -> None:
        """Tells every gateway."""
        for session in self._sessions.values():
            session.tell_load(load)

    async def _hello(self, messages: AsyncIterator[SessionDown]) -> Hello:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                first = await anext(messages)
        except (TimeoutError, StopAsyncIteration) as error:
            raise invalid_request("a session begins with Hello", code="bad_session") from error
        if not isinstance(first, Hello):
            raise invalid_request("a session begins with Hello", code="bad_session")
        if first.protocol_version != PROTOCOL_VERSION:
            raise invalid_request(
                f"gateway {first.gateway_id} speaks protocol {first.protocol_version}, this worker "
                f"{PROTOCOL_VERSION}: run the same version of phloem on both",
                code="protocol_mismatch",
            )
        return first

    def _open(self, hello: Hello) -> GatewaySession:
        session = GatewaySession(
            self._next_number, hello.gateway_id, self._worker.epoch, self._max_queued_messages
        )
        self._next_number += 1
        self._sessions[session.number] = session
        self._metrics.sessions.set(len(self._sessions))
        log.info("session opened", extra={"gateway": hello.gateway_id})
        return session

    async def _read(self, session: GatewaySession, messages: AsyncIterator[SessionDown]) -> None:
        try:
            async for message in messages:
                self._receive(session, message)
        except PhloemError as error:
            self._end(session, error)
        except Exception as error:  # grpc raises bare errors when the caller is gone
            self._end(session, PhloemError("session_broken", f"the session broke: {error}", retryable=True))
        else:
            session.finish()

    def _receive(self, session: GatewaySession, message: SessionDown) -> None:
        match message:
            case Submit():
                self._submit(session, message)
            case Abort():
                self._abort(session, message)
            case Hello():
                raise invalid_request("Hello came twice in one session", code="bad_session")

    def _submit(self, session: GatewaySession, submit: Submit) -> None:
        key = (submit.request_id, submit.attempt)
        if key in session.requests:
            raise invalid_request(
                f"request {submit.request_id} attempt {submit.attempt} was submitted twice",
                code="bad_session",
            )
        refusal = self._refusal_of(submit)
        if refusal is None and not self._outbox.offer(EngineSubmit(session.number, submit)):
            refusal = ErrorInfo("overloaded", "the worker's inbox is full", True, 503, None, 1.0)
        if refusal is not None:
            self._metrics.refused.inc()
            self._send(session, 0, [Ended(*key, "failed", refusal)], "refusal")
            return
        session.requests[key] = False
        self._num_taken += 1
        self._count(1)

    def _refusal_of(self, submit: Submit) -> ErrorInfo | None:
        if submit.epoch != self._worker.epoch:
            return ErrorInfo(
                "stale_epoch",
                f"worker {self._worker.worker_id} has epoch {self._worker.epoch}, not {submit.epoch}",
                retryable=True,
                http_status=503,
            )
        return self._refusal

    def _abort(self, session: GatewaySession, abort: Abort) -> None:
        key = (abort.request_id, abort.attempt)
        if session.requests.get(key) is False:
            session.requests[key] = True
            self._outbox.force(EngineAbort(*key))  # bounded: once per request in flight

    def _settle(self, session: GatewaySession, outputs: list[Output]) -> None:
        for output in outputs:
            if isinstance(output, Ended):
                known = session.requests.pop((output.request_id, output.attempt), None)
                self._count(-1 if known is not None else 0)

    def _send(self, session: GatewaySession, step: int, outputs: list[Output], kind: str) -> None:
        if session.send(step, outputs):
            self._metrics.session_messages.labels(session.gateway_id, kind).inc()
        else:
            self._forget(session)

    def _end(self, session: GatewaySession, error: PhloemError) -> None:
        level = logging.INFO if error.code == WORKER_STOPPED else logging.WARNING
        log.log(level, "session ended: %s", error, extra={"gateway": session.gateway_id})
        session.fail(error)
        self._forget(session)

    def _forget(self, session: GatewaySession) -> None:
        """The session is over: its requests are aborted. Harmless when called twice."""
        if self._sessions.pop(session.number, None) is None:
            return
        self._metrics.sessions.set(len(self._sessions))
        if session.requests:
            self._outbox.force(AbortGateway(session.number))  # bounded: once per session
        self._count(-len(session.requests))
        session.requests.clear()
        log.info("session closed", extra={"gateway": session.gateway_id})

    def _count(self, change: int) -> None:
        self._num_requests += change
        self._metrics.requests.set(self._num_requests)
        if self._num_requests:
            self._idle.clear()
        else:
            self._idle.set()
