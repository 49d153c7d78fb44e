"""One gateway's stream: what goes out to it, and which requests are its own."""

from __future__ import annotations

from typing import TypeAlias

from phloem.shared.batch_queue import BatchQueue
from phloem.shared.errors import PhloemError, overloaded
from phloem.shared.protocol.cluster import WorkerLoad
from phloem.shared.protocol.session import LoadReport, Output, StepMessage

RequestKey: TypeAlias = tuple[str, int]  # (request_id, attempt)
Outgoing: TypeAlias = StepMessage | LoadReport

MAX_BEFORE_LOAD = 16  # a gateway this far behind hears of the load later: outputs go first


class GatewaySession:
    """The front's side of a session.

    The outgoing queue is bounded: a gateway that doesn't read loses its session instead of holding memory
    here. After `fail` nothing more goes out and `next_messages` raises the error.
    """

    def __init__(self, number: int, gateway_id: str, epoch: int, max_queued_messages: int) -> None:
        self.number = number
        self.gateway_id = gateway_id
        self.requests: dict[RequestKey, bool] = {}  # in flight here -> whether its abort was passed on
        self._epoch = epoch
        self._outgoing: BatchQueue[Outgoing] = BatchQueue(max_queued_messages)
        self._error: PhloemError | None = None

    @property
    def failed(self) -> bool:
        return self._error is not None

    def send(self, step: int, outputs: list[Output]) -> bool:
        """Queues one message; False (and the session has failed) when the gateway is too far behind."""
        if self.failed:
            return False
        if self._outgoing.offer(StepMessage(self._epoch, step, outputs)):
            return True
        self.fail(
            overloaded(
                f"gateway {self.gateway_id} reads too slowly: {len(self._outgoing)} messages wait",
                code="session_overflow",
            )
        )
        return False

    def tell_load(self, load: WorkerLoad) -> None:
        """Dropped when much waits: the next change or heartbeat says it too."""
        if len(self._outgoing) < MAX_BEFORE_LOAD:
            self._outgoing.offer(LoadReport(self._epoch, load))

    def fail(self, error: PhloemError) -> None:
        """Ends the session with `error`; what is queued is dropped. The first error counts."""
        if self._error is None:
            self._error = error
            self._outgoing.take_now()
            self._outgoing.close()

    def finish(self) -> None:
        """The gateway said goodbye: ends the stream without an error."""
        self._outgoing.close()

    async def next_messages(self) -> list[Outgoing]:
        """All that waits; empty when the session is over. Raises the error that it failed with."""
        messages = await self._outgoing.take_all()
        if self._error is not None:
            raise self._error
        return messages
