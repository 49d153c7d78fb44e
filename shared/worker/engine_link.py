"""The front's conversation with a running engine: who gets which message."""

from __future__ import annotations

import asyncio
import logging
import time

from phloem.shared.batch_queue import BatchQueue
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.engine import (
    AuditReply,
    EngineFailed,
    EngineMessage,
    EngineReady,
    EngineUp,
    Progress,
    Reply,
    StepReport,
    TreeDump,
)
from phloem.shared.worker.engine_calls import EngineCalls
from phloem.shared.worker.engine_process import EngineProcess
from phloem.shared.worker.index_publisher import IndexPublisher
from phloem.shared.worker.load_teller import LoadTeller
from phloem.shared.worker.metrics import WorkerMetrics
from phloem.shared.worker.registration import Registration
from phloem.shared.worker.sessions import Sessions

log = logging.getLogger(__name__)

WATCH_INTERVAL_S = 0.5
SUSPENDED_TIMEOUT_S = 2.5


class EngineLink:
    """Three loops, each of which raises `PhloemError` when the engine is lost."""

    def __init__(
        self,
        engine: EngineProcess,
        outbox: BatchQueue[EngineMessage],
        calls: EngineCalls,
        sessions: Sessions,
        registration: Registration,
        publisher: IndexPublisher,
        metrics: WorkerMetrics,
    ) -> None:
        self._engine = engine
        self._outbox = outbox
        self._calls = calls
        self._sessions = sessions
        self._registration = registration
        self._publisher = publisher
        self._metrics = metrics
        self._teller = LoadTeller(sessions.tell_load)
        self._heard_at = time.monotonic()

    async def send_loop(self) -> None:
        """Sends all that waits in the outbox as one frame, again and again, until the outbox is closed."""
        while messages := await self._outbox.take_all():
            await self._engine.send(messages)

    async def receive_loop(self) -> None:
        """Passes on what the engine says, until it is gone."""
        while True:
            message = await self._engine.receive()
            self._heard_at = time.monotonic()
            self._dispatch(message)

    async def watch_loop(self, hang_timeout_s: float) -> None:
        """Raises when the engine is suspended, or silent for `hang_timeout_s` while requests are in flight:
        its peers need an error, not a silence."""
        running_at = time.monotonic()
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            now = time.monotonic()
            if not self._engine.is_stopped():
                running_at = now
            if self._sessions.num_requests == 0:
                self._heard_at = now
            if now - running_at > SUSPENDED_TIMEOUT_S:
                raise _hung("the engine process is suspended")
            if now - self._heard_at > hang_timeout_s:
                raise _hung(f"the engine was silent for {hang_timeout_s:.0f} s with requests in flight")

    def _dispatch(self, message: EngineUp) -> None:
        match message:
            case StepReport():
                self._on_step(message)
            case Reply() | AuditReply():
                self._calls.resolve(message)
            case TreeDump():
                self._publisher.on_tree_dump(message.block_hashes)
            case EngineFailed(error):
                raise PhloemError.from_info(error)
            case Progress() | EngineReady():
                log.warning("the engine sent %s while serving", type(message).__name__)

    def _on_step(self, report: StepReport) -> None:
        self._sessions.deliver(report)
        self._publisher.note(report.stored, report.removed)
        if report.load is not None:
            self._registration.set_load(report.load)
            self._teller.note(report.load)
            self._metrics.set_load(report.load)


def _hung(message: str) -> PhloemError:
    return PhloemError("engine_hung", message, retryable=True, http_status=503, retry_after_s=1.0)
