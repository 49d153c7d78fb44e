"""How requests end: the one place that tells the scheduler, the hand-over and the gateway."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from phloem.shared.engine.handover import Ended
from phloem.shared.engine.handover_receive import HandoverReceiver
from phloem.shared.engine.handover_send import HandoverSender
from phloem.shared.engine.outbox import Outbox
from phloem.shared.engine.requests import Request
from phloem.shared.engine.scheduler import Scheduler
from phloem.shared.errors import ErrorInfo
from phloem.shared.protocol.session import EndReason, PeerRef


class RequestEnds:
    """Every accepted request passes through here exactly once."""

    def __init__(
        self, scheduler: Scheduler, sender: HandoverSender, receiver: HandoverReceiver, outbox: Outbox
    ) -> None:
        self._scheduler = scheduler
        self._sender = sender
        self._receiver = receiver
        self._outbox = outbox

    def finish(self, request: Request, reason: EndReason, error: ErrorInfo | None = None) -> None:
        """Its pages come back, and its gateway is told."""
        self._scheduler.end(request)
        self._outbox.ended(request, reason, error)

    def drop(self, request: Request, reason: EndReason, error: ErrorInfo | None = None) -> None:
        """Ends a request from our side; the peer of its hand-over is told too."""
        code = error.code if error else reason
        if request.phase == "prefill":
            self._sender.drop(request.key, code)
        elif request.phase == "decode":
            self._receiver.drop(request, code)
        self.finish(request, reason, error)

    def abort(self, request: Request | None) -> None:
        """The gateway gave it up; nothing happens to one that has ended."""
        if request is not None:
            self.drop(request, "aborted")

    def abort_gateway(self, gateway: int) -> None:
        """The session of this gateway broke."""
        for request in self._scheduler.live_requests():
            if request.gateway == gateway:
                self.drop(request, "aborted")

    def abort_all(self) -> None:
        for request in self._scheduler.live_requests():
            self.drop(request, "aborted")

    def fail_peers_requests(self, peer: PeerRef, error: ErrorInfo) -> None:
        """A peer is gone. Also those that no channel knows of yet: they would wait for it for ever."""
        for request in self._scheduler.live_requests():
            if request.phase != "both" and request.peer == peer:
                self.drop(request, "failed", error)

    def fail_cut_off(self, cut_off: Mapping[str, ErrorInfo]) -> None:
        """Requests for a worker, by id, that no channel opens with: they would wait in vain, and the gateway
        finds another pair for them."""
        for request in self._scheduler.live_requests() if cut_off else ():
            if request.phase == "prefill" and request.peer is not None:
                why = cut_off.get(request.peer.worker_id)
                if why is not None:
                    message = f"no KV channel with {request.peer.worker_id}: {why.message}"
                    self.drop(request, "failed", ErrorInfo("channel_refused", message, True, 503))

    def fail_overdue(self, now_s: float) -> None:
        """Requests whose own deadline has passed."""
        for request in self._scheduler.live_requests():
            if request.deadline_s < now_s:
                error = ErrorInfo("deadline_exceeded", "the request's time is up", False, 504)
                self.drop(request, "failed", error)

    def handovers(self, ended: Sequence[Ended | None]) -> None:
        """Hand-overs that are over: a failed one fails its request, a good one has handed it over."""
        for item in ended:
            request = None if item is None else self._scheduler.get(item.key)
            if item is not None and request is not None:
                self.finish(request, "failed" if item.error else "handed_over", item.error)
