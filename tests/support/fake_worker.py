"""A scripted worker: a real gRPC session and a real lease, but the test decides what it says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from phloem.shared.discovery.registry import Registry
from phloem.shared.errors import ErrorInfo, PhloemError
from phloem.shared.protocol.cluster import Role, WorkerLoad, WorkerRecord
from phloem.shared.protocol.engine import AuditReply
from phloem.shared.protocol.session import (
    Abort,
    Ended,
    EndReason,
    FinishReason,
    Hello,
    LoadReport,
    Output,
    PeerRef,
    SessionDown,
    SessionUp,
    StepMessage,
    Submit,
    TokensOut,
    Welcome,
    session_down,
    session_up,
)
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
from phloem.shared.rpc.server import RpcServer
from tests.support.waiting import until
from tests.support.worker_records import new_record

FIRST_TOKEN = 1000


class FakeWorker:
    """What one gateway sent is in `submits` and `aborts`; `tokens`, `ended` and `broken` answer it."""

    def __init__(self, worker_id: str, role: Role, secret: bytes) -> None:
        self.worker_id = worker_id
        self.role: Role = role
        self.submits: list[Submit] = []
        self.aborts: list[tuple[str, int]] = []
        self.num_flushes = 0
        self.num_sessions = 0
        self.record: WorkerRecord | None = None
        self._secret = secret
        self._outgoing: asyncio.Queue[list[Output] | LoadReport | PhloemError] = asyncio.Queue()
        self._server = RpcServer(secret)
        self._step = 0
        self._heartbeat: asyncio.Task[None] | None = None

    @property
    def ref(self) -> PeerRef:
        assert self.record is not None
        return PeerRef(self.worker_id, self.record.epoch)

    async def start(self, registry: Registry) -> None:
        """Serves and registers."""
        server = self._server
        server.add_stream(WORKER_SERVICE, "Session", session_down, session_up, self._serve)
        server.add_unary(WORKER_SERVICE, "Flush", flush_request, done, self._on_flush)
        server.add_unary(WORKER_SERVICE, "Audit", audit_call, audit_reply, self._on_audit)
        port = await server.start("127.0.0.1", 0)
        self.record = new_record(
            self.worker_id,
            self.role,
            epoch=await registry.next_epoch(),
            rpc_address=f"127.0.0.1:{port}",
            model_id="fake",
            context_length=1000,
            kv_bytes_per_token=100,
            max_running_requests=64,
            load=WorkerLoad(free_pages=1000, total_pages=1000),
        )
        await registry.renew_worker(self.record, notify=True)
        self._heartbeat = asyncio.create_task(self._beat(registry))

    async def stop_heartbeat(self) -> None:
        """The lease runs out; the session stays as it is."""
        if self._heartbeat is not None:
            self._heartbeat.cancel()
            await asyncio.gather(self._heartbeat, return_exceptions=True)

    async def set_draining(self, registry: Registry) -> None:
        assert self.record is not None
        self.record = msgspec.structs.replace(self.record, state="draining")
        await registry.renew_worker(self.record, notify=True)

    async def stop(self) -> None:
        await self.stop_heartbeat()
        await self._server.stop(0)

    async def next_submit(self, count: int = 1) -> Submit:
        """The `count`-th submission, once it is here."""
        await until(lambda: len(self.submits) >= count)
        return self.submits[count - 1]

    def send(self, *outputs: Output) -> None:
        """One step message."""
        self._outgoing.put_nowait(list(outputs))

    def tell_load(self, load: WorkerLoad) -> None:
        """Over the session, as a worker does when its load has changed, and with the next heartbeat."""
        assert self.record is not None
        self.record = msgspec.structs.replace(self.record, load=load)
        self._outgoing.put_nowait(LoadReport(self.ref.epoch, load))

    def tokens(
        self, submit: Submit, start: int, count: int = 1, finish: FinishReason | None = None
    ) -> TokensOut:
        """What an engine would say of tokens [start, start + count); each is `FIRST_TOKEN` + its index."""
        token_ids = [FIRST_TOKEN + index for index in range(start, start + count)]
        return TokensOut(submit.request_id, submit.attempt, start, token_ids, finish)

    def ended(self, submit: Submit, reason: EndReason, error: ErrorInfo | None = None) -> Ended:
        return Ended(submit.request_id, submit.attempt, reason, error)

    def break_session(self, *, code: str = "session_broken", retryable: bool = True) -> None:
        """The session ends with an error; the gateway may open another."""
        self._outgoing.put_nowait(PhloemError(code, "broken", retryable=retryable, http_status=503))

    async def _serve(self, messages: AsyncIterator[SessionDown]) -> AsyncIterator[SessionUp]:
        assert isinstance(await anext(messages), Hello)
        self.num_sessions += 1
        self._outgoing = asyncio.Queue()
        reading = asyncio.create_task(self._read(messages))
        try:
            yield Welcome(self.worker_id, self.ref.epoch, self.role)
            while True:
                outputs = await self._outgoing.get()
                if isinstance(outputs, PhloemError):
                    raise outputs
                if isinstance(outputs, LoadReport):
                    yield outputs
                    continue
                self._step += 1
                yield StepMessage(self.ref.epoch, self._step, outputs)
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _read(self, messages: AsyncIterator[SessionDown]) -> None:
        async for message in messages:
            match message:
                case Submit():
                    self.submits.append(message)
                case Abort(request_id, attempt):
                    self.aborts.append((request_id, attempt))
                case Hello():
                    raise AssertionError("Hello came twice")

    async def _on_flush(self, request: FlushRequest) -> Done:
        self.num_flushes += 1
        return Done()

    async def _on_audit(self, request: AuditCall) -> AuditReply:
        return AuditReply(1, [], 10, 10, 0, 0, len(self.submits), 0)

    async def _beat(self, registry: Registry) -> None:
        assert self.record is not None
        while True:
            await asyncio.sleep(0.2)
            await registry.renew_worker(self.record)


@asynccontextmanager
async def fake_worker(
    registry: Registry, worker_id: str, role: Role, secret: bytes
) -> AsyncIterator[FakeWorker]:
    worker = FakeWorker(worker_id, role, secret)
    await worker.start(registry)
    try:
        yield worker
    finally:
        await worker.stop()
