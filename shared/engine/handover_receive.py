"""The decode side of hand-overs: pages arrive, are checked, and the request joins the batch.

    reserved -> Ready -> pieces (digest checked, scattered) -> Last -> admitted

Everything that does not add up (digest, range, count, epoch) fails closed: the request fails retryably, its
pages go back unread, and the gateway has the prompt prefilled again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from phloem.shared.engine.handover import (
    Channels,
    Ended,
    PageStore,
    RecentKeys,
    Span,
    span_bytes,
)
from phloem.shared.engine.kv_pool import OwnerKey
from phloem.shared.engine.requests import Request
from phloem.shared.errors import ErrorInfo, PhloemError
from phloem.shared.protocol.session import PeerRef
from phloem.shared.protocol.transfer import Cancel, Last, Ready
from phloem.shared.transfer.events import PieceReceived


class _ReceivePlan:
    def __init__(self, request: Request, peer: PeerRef, now_s: float) -> None:
        self.request = request
        self.peer = peer
        self.num_held_pages = request.num_tree_pages
        self.announced = False
        self.reserved_at_s = now_s
        self.num_pieces = 0
        self.page = request.num_tree_pages  # next page and layer that must arrive: pieces come in order
        self.layer = 0


class HandoverReceiver:
    """All hand-overs that this engine is the decode side of. Called from the engine's thread only."""

    def __init__(
        self, channels: Channels, store: PageStore, *, timeout_s: float, clock: Callable[[], float]
    ) -> None:
        self._channels = channels
        self._store = store
        self._timeout_s = timeout_s
        self._clock = clock
        self._plans: dict[OwnerKey, _ReceivePlan] = {}
        self._recent = RecentKeys()
        self._cancelled_early = RecentKeys()
        self.num_pages_received = 0
        self.num_bytes_received = 0

    @property
    def active(self) -> bool:
        return bool(self._plans)

    def reserved(self, request: Request) -> Ended | None:
        """The request has its pages: tell the prefill side, now or when its channel opens."""
        assert request.peer is not None
        if request.key in self._cancelled_early:
            return Ended(request.key, _cancelled(request.peer, "it had ended there before"))
        plan = self._plans[request.key] = _ReceivePlan(request, request.peer, self._clock())
        self._announce(plan)
        return None

    def on_opened(self, peer: PeerRef) -> None:
        for plan in self._plans.values():
            if plan.peer == peer:
                self._announce(plan)

    def on_lost(self, peer: PeerRef, error: ErrorInfo) -> list[Ended]:
        """The channel or the peer is gone: what it had not sent to the end fails, retryably."""
        lost_error = ErrorInfo(
            "channel_lost", f"KV channel from {peer.worker_id}: {error.message}", True, 503
        )
        lost = [key for key, plan in self._plans.items() if plan.peer == peer]
        return [self._fail(key, lost_error) for key in lost]

    def on_piece(self, event: PieceReceived) -> Ended | None:
        """Scatters a piece and gives its staging slot back, whatever became of the request."""
        header = event.header
        key = (header.request_id, header.attempt)
        plan = self._plans.get(key)
        try:
            if plan is None or plan.peer != event.peer:
                return None  # ended here; the sender has been or will be told
            span = Span(header.page_start, header.num_pages, header.layer_start, header.layer_end)
            problem = self._range_problem(plan, span, header.num_bytes)
            if problem is None:
                page_ids = plan.request.page_ids[span.page_start : span.page_start + span.num_pages]
                digest = self._store.scatter(page_ids, span.layer_start, span.layer_end, event.data)
                if digest != header.digest:
                    problem = ErrorInfo("kv_digest_mismatch", "KV arrived damaged", True, 503)
        finally:
            self._channels.release(event)
        if problem is not None:
            self._cancel(plan, problem)
            return self._fail(key, problem)
        self._advance(plan, span, header.num_bytes)
        return None

    def on_last(self, peer: PeerRef, message: Last) -> tuple[Request | None, Ended | None]:
        """The request that may run now, or the failure that its count proves."""
        key = (message.request_id, message.attempt)
        plan = self._plans.get(key)
        if plan is None or plan.peer != peer:
            return None, None
        complete = plan.page == len(plan.request.page_ids) and plan.layer == 0
        if not complete or message.num_pieces != plan.num_pieces or not message.token_ids:
            return None, self._fail(key, ErrorInfo("kv_incomplete", "KV pages are missing", True, 503))
        del self._plans[key]
        self._recent.add(key)
        return plan.request, None

    def on_cancel(self, peer: PeerRef, message: Cancel) -> Ended | None:
        key = (message.request_id, message.attempt)
        plan = self._plans.get(key)
        if plan is not None and plan.peer == peer:
            return self._fail(key, _cancelled(peer, message.message or message.code))
        if key not in self._recent:
            self._cancelled_early.add(key)
        return None

    def drop(self, key: OwnerKey, code: str) -> None:
        """The request ended here for another reason (aborted, timed out): the prefill side is told."""
        plan = self._plans.pop(key, None)
        self._recent.add(key)
        if plan is not None:
            self._cancel(plan, ErrorInfo(code, ""))

    def expired(self) -> list[Ended]:
        """Requests whose prefill side has had no open channel for too long."""
        before_s = self._clock() - self._timeout_s
        late = [
            key for key, plan in self._plans.items() if not plan.announced and plan.reserved_at_s < before_s
        ]
        error = ErrorInfo("handover_timeout", "the prefill worker opened no KV channel in time", True, 503)
        return [self._fail(key, error) for key in late]

    # -- inside ----------------------------------------------------------------------------------------

    def _announce(self, plan: _ReceivePlan) -> None:
        if plan.announced or not self._channels.is_open(plan.peer, "decode"):
            return
        plan.announced = True
        ready = Ready(plan.request.request_id, plan.request.attempt, plan.num_held_pages)
        with contextlib.suppress(PhloemError):  # the channel broke meanwhile: its ChannelLost follows
            self._channels.send_ready(plan.peer, ready)

    def _range_problem(self, plan: _ReceivePlan, span: Span, num_bytes: int) -> ErrorInfo | None:
        """Pieces come in order without gaps, whole pages or one page by groups of layers."""
        layers = self._store.num_layers
        in_order = span.page_start == plan.page and span.layer_start == plan.layer
        inside = span.num_pages >= 1 and span.page_start + span.num_pages <= len(plan.request.page_ids)
        sound = span.layer_start < span.layer_end <= layers and (
            span.num_pages == 1 or (span.layer_start == 0 and span.layer_end == layers)
        )
        if in_order and inside and sound and num_bytes == span_bytes(self._store, span):
            return None
        return ErrorInfo("kv_bad_piece", "a KV piece is out of order or has the wrong size", True, 503)

    def _advance(self, plan: _ReceivePlan, span: Span, num_bytes: int) -> None:
        plan.num_pieces += 1
        done = span.layer_end == self._store.num_layers
        plan.page = span.page_start + span.num_pages if done else span.page_start
        plan.layer = 0 if done else span.layer_end
        self.num_bytes_received += num_bytes
        self.num_pages_received += span.num_pages if done else 0

    def _fail(self, key: OwnerKey, error: ErrorInfo) -> Ended:
        self._plans.pop(key)
        self._recent.add(key)
        return Ended(key, error)

    def _cancel(self, plan: _ReceivePlan, error: ErrorInfo) -> None:
        if not plan.announced or not self._channels.is_open(plan.peer, "decode"):
            return
        cancel = Cancel(plan.request.request_id, plan.request.attempt, error.code, error.message)
        with contextlib.suppress(PhloemError):
            self._channels.send_cancel(plan.peer, cancel, "decode")


def _cancelled(peer: PeerRef, why: str) -> ErrorInfo:
    return ErrorInfo(
        "handover_cancelled", f"prefill worker {peer.worker_id} gave the request up: {why}", True, 503
    )
