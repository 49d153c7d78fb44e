"""One long-lived stream to one worker: submissions and aborts down, one message per engine step up."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable

import grpc.aio
import msgspec

from phloem.services.gateway.cluster.metrics import ClusterMetrics
from phloem.services.gateway.cluster.options import ClusterOptions
from phloem.services.gateway.cluster.told_load import ToldLoad
from phloem.shared.batch_queue import BatchQueue
from phloem.shared.errors import PhloemError, overloaded, unavailable
from phloem.shared.protocol.cluster import WorkerRecord
from phloem.shared.protocol.session import (
    Abort,
    Hello,
    LoadReport,
    PeerRef,
    SessionDown,
    SessionUp,
    StepMessage,
    Submit,
    Welcome,
    session_down,
    session_up,
)
from phloem.shared.protocol.worker_rpc import WORKER_SERVICE
from phloem.shared.rpc.client import RpcChannel, RpcStream

log = logging.getLogger(__name__)

MIN_BACKOFF_S = 0.1
MAX_BACKOFF_S = 1.0


class WorkerSession:
    """The session with one (worker, epoch), opened again whenever it breaks, until `run` is cancelled.

    `on_step` gets every step's message; `on_load` is called at every word on the worker's load; `on_lost` is
    called once per break, after which whatever was submitted is gone; `on_change` when the worker can be
    routed to, or can't any more. All are called on the event loop.
    """

    def __init__(
        self,
        record: WorkerRecord,
        gateway_id: str,
        cluster_secret: bytes,
        options: ClusterOptions,
        metrics: ClusterMetrics,
        *,
        on_step: Callable[[PeerRef, StepMessage], None],
        on_load: Callable[[PeerRef], None],
        on_lost: Callable[[PeerRef, PhloemError], None],
        on_change: Callable[[], None],
    ) -> None:
        self.record = record
        self.ref = PeerRef(record.worker_id, record.epoch)
        self.channel = RpcChannel(record.rpc_address, cluster_secret)
        self.up = False
        self.heard_at = time.monotonic()
        self._told = ToldLoad()
        self.num_messages = 0  # step messages received
        self._gateway_id = gateway_id
        self._options = options
        self._metrics = metrics
        self._messages_received = metrics.session_messages.labels(record.worker_id)
        self._on_step = on_step
        self._on_load = on_load
        self._on_lost = on_lost
        self._on_change = on_change
        self._last_complaint = ""
        self._given_up = asyncio.Event()
        self._outbox: BatchQueue[SessionDown] = BatchQueue(options.session_outbox_messages)

    def renew(self, record: WorkerRecord) -> None:
        """The worker's heartbeat in the registry."""
        self.record = self._told.latest(record, time.monotonic())
        if self.record is record:
            self._on_load(self.ref)

    def submit(self, submit: Submit) -> None:
        """Raises `PhloemError` (retryable) when the session is down or its outbox is full."""
        if not self.up:
            raise unavailable(f"the session with worker {self.ref.worker_id} is down", code="session_down")
        if not self._outbox.offer(submit):
            raise overloaded(f"too many messages wait for worker {self.ref.worker_id}")

    def abort(self, request_id: str, attempt: int) -> None:
        """At most one per submission, and none is ever dropped while the session is up."""
        if self.up:
            self._outbox.force(Abort(request_id, attempt))

    async def run(self) -> None:
        """Keeps the session open until cancelled."""
        backoff_s = MIN_BACKOFF_S
        try:
            while True:
                error = await self._one_session()
                backoff_s = MIN_BACKOFF_S if self.up else min(MAX_BACKOFF_S, backoff_s * 2)
                self._complain(error)
                self._break(error)
                await asyncio.sleep(backoff_s)
        finally:
            self._break(unavailable(f"worker {self.ref.worker_id} has left", code="worker_lost"))
            await self.channel.close()

    def lose(self, error: PhloemError) -> None:
        """Gives up what is under way there, before the stream itself has noticed anything."""
        self._given_up.set()
        self._break(error)

    async def _one_session(self) -> PhloemError:
        """From Hello to the break; returns its reason."""
        try:
            await self._talk()
        except PhloemError as error:
            return error
        except grpc.aio.BaseError as error:
            return unavailable(f"gRPC failed: {error}", code="session_broken")
        return unavailable(f"worker {self.ref.worker_id} ended the session", code="session_ended")

    async def _talk(self) -> None:
        stream = self.channel.stream(WORKER_SERVICE, "Session", session_down, session_up)
        try:
            answers = aiter(stream.__aiter__())
            await self._greet(stream, answers)
            self._open()
            await stream.drive(self._read(answers), self._write(stream), self._wait_until_given_up())
        finally:
            stream.cancel()

    async def _greet(
        self, stream: RpcStream[SessionDown, SessionUp], answers: AsyncIterator[SessionUp]
    ) -> None:
        try:
            async with asyncio.timeout(self._options.session_connect_timeout_s):
                await stream.write(Hello(self._gateway_id))
                welcome = await anext(answers)
        except (TimeoutError, StopAsyncIteration) as error:
            raise unavailable(
                f"worker {self.ref.worker_id} did not answer in time", code="session_down"
            ) from error
        if not isinstance(welcome, Welcome) or PeerRef(welcome.worker_id, welcome.epoch) != self.ref:
            raise unavailable(f"another worker answers at {self.record.rpc_address}", code="stale_epoch")

    def _open(self) -> None:
        self._outbox = BatchQueue(self._options.session_outbox_messages)
        self._given_up.clear()
        self.up = True
        self.heard_at = time.monotonic()
        log.info("session opened", extra={"worker": self.ref.worker_id, "epoch": self.ref.epoch})
        self._on_change()

    def _complain(self, error: PhloemError) -> None:
        """Says once why a session can't be opened, not at every attempt."""
        if not self.up and str(error) != self._last_complaint:
            self._last_complaint = str(error)
            log.warning("no session yet: %s", error, extra={"worker": self.ref.worker_id})

    def _break(self, error: PhloemError) -> None:
        if not self.up:
            return
        self.up = False
        self._outbox.close()
        self._metrics.sessions_lost.labels(self.ref.worker_id).inc()
        level = logging.INFO if error.code == "worker_lost" else logging.WARNING
        log.log(level, "session ended: %s", error, extra={"worker": self.ref.worker_id})
        if error.code == "peer_unavailable" or not error.retryable:  # no fault of the requests under way
            error = unavailable(f"the session with worker {self.ref.worker_id} broke", code="session_broken")
        self._on_lost(self.ref, error)
        self._on_change()

    async def _read(self, answers: AsyncIterator[SessionUp]) -> None:
        async for message in answers:
            self._receive(message)

    async def _write(self, stream: RpcStream[SessionDown, SessionUp]) -> None:
        while messages := await self._outbox.take_all():
            for message in messages:
                await stream.write(message)

    async def _wait_until_given_up(self) -> None:
        await self._given_up.wait()

    def _receive(self, message: SessionUp) -> None:
        self.heard_at = time.monotonic()
        if isinstance(message, Welcome) or message.epoch != self.ref.epoch:
            return
        if isinstance(message, LoadReport):
            self.record = msgspec.structs.replace(self.record, load=message.load)
            self._told.note(message.load, self.heard_at)
            self._on_load(self.ref)
            return
        self.num_messages += 1
        self._messages_received.inc()
        self._on_step(self.ref, message)
