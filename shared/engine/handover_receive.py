"""The decode side of hand-overs: pages arrive, are checked, and the request joins the batch.

    reserved -> Ready -> pieces (scattered, digests compared) -> Last -> every digest compared -> admitted

Pieces are scattered beside the engine's steps, where the device can wait for their bytes as soon as they are
announced; `poll` looks which of them are done. Everything that does not
add up (digest, range, count, epoch) fails closed: the request fails retryably, its pages go back unread, and
the gateway has the prompt prefilled again.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from phloem.shared.engine.handover import Channels, Ended, PageStore, RecentKeys
from phloem.shared.engine.kv_pool import OwnerKey
from phloem.shared.engine.page_layers import Span
from phloem.shared.engine.receive_plan import ReceivePlan, Scattering
from phloem.shared.engine.requests import Request
from phloem.shared.errors import ErrorInfo, PhloemError
from phloem.shared.protocol.session import PeerRef
from phloem.shared.protocol.transfer import Admitted, Cancel, Last, Ready
from phloem.shared.transfer.events import PieceReceived

log = logging.getLogger(__name__)

_LOOK_S = 0.000_05
_LANDING_LOOK_S = 0.000_002  # more with the wake-up; others get the interpreter meanwhile
_LANDING_S = 0.005  # after the peer's last word: who takes longer has a slow link, or hangs


class Arrived(NamedTuple):
    """All KV of a request is in its pages and was checked; `token_ids` were made by the prefill side."""

    request: Request
    token_ids: list[int]


class HandoverReceiver:
    """All hand-overs that this engine is the decode side of. Called from the engine's thread only."""

    def __init__(
        self, channels: Channels, store: PageStore, *, timeout_s: float, clock: Callable[[], float]
    ) -> None:
        self._channels = channels
        self._store = store
        self._timeout_s = timeout_s
        self._clock = clock
        self._plans: dict[OwnerKey, ReceivePlan] = {}
        self._moving: dict[OwnerKey, ReceivePlan] = {}  # those with pieces or a `Last` that `poll` sees to
        self._heard_s: dict[PeerRef, float] = {}  # when something last came of a peer's hand-overs
        self._untold: deque[tuple[PeerRef, Admitted]] = deque()
        self._recent = RecentKeys()
        self._cancelled_early = RecentKeys()
        self.num_pages_received = 0
        self.num_bytes_received = 0

    @property
    def active(self) -> bool:
        return bool(self._plans)

    @property
    def is_moving(self) -> bool:
        """`poll` will have something to say without another message."""
        return bool(self._moving)

    @property
    def next_look_s(self) -> float:
        """How long to wait, while no message comes, until one looks again whether `has_news`: hardly for a
        request whose last bytes are crossing, as long as the link and the peer are as fast as that."""
        soon_s = self._clock() - _LANDING_S
        landing = any(
            plan.is_landing and self._heard_s.get(plan.peer, 0.0) > soon_s for plan in self._moving.values()
        )
        return _LANDING_LOOK_S if landing else _LOOK_S

    @property
    def has_news(self) -> bool:
        """`poll` has something to say now."""
        return any(plan.scattering[0].is_over if plan.scattering else True for plan in self._moving.values())

    def reserved(self, request: Request) -> Ended | None:
        """The request has its pages: tell the prefill side, now or when its channel opens."""
        assert request.peer is not None
        if request.key in self._cancelled_early:
            return Ended(request.key, _cancelled(request.peer, "it had ended there before"))
        plan = ReceivePlan(request, request.peer, self._store.num_layers, self._clock())
        self._plans[request.key] = plan
        self._announce(plan)
        return None

    def on_opened(self, peer: PeerRef) -> None:
        for plan in self._plans.values():
            if plan.peer == peer:
                self._announce(plan)

    def on_lost(self, peer: PeerRef, error: ErrorInfo) -> list[Ended]:
        """The channel or the peer is gone: what it had not sent to the end fails, retryably.

        What has come with its `Last` is whole: only the device is still busy with it. If the channel's end
        cut off the bytes, their digest tells.
        """
        self._heard_s.pop(peer, None)
        lost_error = ErrorInfo(
            "channel_lost", f"KV channel from {peer.worker_id}: {error.message}", True, 503
        )
        lost = [plan for plan in self._plans.values() if plan.peer == peer and not plan.has_come]
        return [self._fail(plan, lost_error) for plan in lost]

    def on_piece(self, event: PieceReceived) -> Ended | None:
        """Begins to scatter a piece, and gives its staging slot back when that is done, whatever became of
        the request."""
        header = event.header
        plan = self._plans.get((header.request_id, header.attempt))
        if plan is None or plan.peer != event.peer:
            self._channels.release(event)
            return None  # ended here; the sender has been or will be told
        self._heard_s[event.peer] = self._clock()
        span = Span(header.page_start, header.num_pages, header.layer_start, header.layer_end)
        if (
            plan.last is not None
            or not plan.arrived.accepts(span)
            or not self._has_bytes_of(span, header.num_bytes)
        ):
            self._channels.release(event)
            return self._refuse(plan, "kv_bad_piece", "a KV piece is out of order or has the wrong size")
        plan.arrived.note(span)
        moved = self._store.scatter(
            span.of(plan.request.page_ids),
            span.layer_start,
            span.layer_end,
            event.data,
            after=event.incoming,
            beside=plan.arrived.num_left * self._store.layer_page_bytes,
        )
        self._channels.release(event, moved)
        plan.num_pieces += 1
        plan.last_piece_s = self._heard_s[event.peer]
        plan.first_piece_s = plan.first_piece_s or plan.last_piece_s
        plan.scattering.append(Scattering(moved, event))
        self._moving[plan.key] = plan
        self.num_bytes_received += header.num_bytes
        self.num_pages_received += span.num_pages if span.layer_end == self._store.num_layers else 0
        return None

    def on_last(self, peer: PeerRef, message: Last) -> Ended | None:
        """Nothing more comes; `poll` admits the request, or this tells the failure that its count proves."""
        plan = self._plans.get((message.request_id, message.attempt))
        if plan is None or plan.peer != peer:
            return None
        self._heard_s[peer] = self._clock()
        if not plan.arrived.is_complete or message.num_pieces != plan.num_pieces or not message.token_ids:
            return self._fail(plan, ErrorInfo("kv_incomplete", "KV pages are missing", True, 503))
        plan.last = message
        self._moving[plan.key] = plan
        return None

    def poll(self) -> tuple[list[Arrived], list[Ended]]:
        """Compares the digests of what has been scattered by now: the requests that may run, and those that
        fail."""
        arrived: list[Arrived] = []
        failed: list[Ended] = []
        for plan in list(self._moving.values()):
            if not self._is_sound(plan):
                failed.append(self._refuse(plan, "kv_digest_mismatch", "KV arrived damaged"))
            elif not plan.scattering:
                del self._moving[plan.key]
                if plan.last is not None:
                    arrived.append(self._admit(plan, plan.last))
        return arrived, failed

    def tell_admitted(self) -> None:
        """Tells the prefill sides what `poll` has admitted. No request waits for it: it only measures."""
        while self._untold:
            peer, message = self._untold.popleft()
            with contextlib.suppress(PhloemError):
                self._channels.send_admitted(peer, message)

    def on_cancel(self, peer: PeerRef, message: Cancel) -> Ended | None:
        key = (message.request_id, message.attempt)
        plan = self._plans.get(key)
        if plan is not None and plan.peer == peer:
            return self._fail(plan, _cancelled(peer, message.message or message.code))
        if key not in self._recent:
            self._cancelled_early.add(key)
        return None

    def drop(self, request: Request, code: str) -> None:
        """The request ended here for another reason (aborted, timed out), maybe before it had pages: the
        prefill side is told."""
        plan = self._plans.get(request.key)
        if plan is not None:
            self._forget(plan)
        self._recent.add(request.key)
        assert request.peer is not None
        self._cancel(request.peer, request.key, ErrorInfo(code, ""))

    def expired(self) -> list[Ended]:
        """Requests whose prefill side has had no open channel for too long, or has been silent since: it
        sends none of the KV that it promised, neither theirs nor other requests'."""
        before_s = self._clock() - self._timeout_s
        no_channel = ErrorInfo(
            "handover_timeout", "the prefill worker opened no KV channel in time", True, 503
        )
        late = [plan for plan in self._plans.values() if plan.since_s < before_s]
        unannounced = [self._fail(plan, no_channel) for plan in late if not plan.announced]
        silent = [
            self._refuse(plan, "handover_timeout", "the prefill worker sent no KV in time")
            for plan in late
            if plan.announced and self._heard_s.get(plan.peer, 0.0) < before_s
        ]
        return unannounced + silent

    # -- inside ----------------------------------------------------------------------------------------

    def _announce(self, plan: ReceivePlan) -> None:
        if plan.announced or not self._channels.is_open(plan.peer, "decode"):
            return
        plan.announced = True
        plan.since_s = self._clock()
        ready = Ready(plan.request.request_id, plan.request.attempt, plan.num_held_pages)
        with contextlib.suppress(PhloemError):  # the channel broke meanwhile: its ChannelLost follows
            self._channels.send_ready(plan.peer, ready)

    def _has_bytes_of(self, span: Span, num_bytes: int) -> bool:
        return num_bytes == span.layers_of_pages() * self._store.layer_page_bytes

    def _is_sound(self, plan: ReceivePlan) -> bool:
        """Compares, in order, what is done; whether all of that came as it was sent."""
        while plan.scattering and plan.scattering[0].is_over:
            moved, piece = plan.scattering.popleft()
            if moved.digest() != piece.digest:
                return False
        return True

    def _admit(self, plan: ReceivePlan, last: Last) -> Arrived:
        self._forget(plan)
        log.debug(
            "KV of %s has arrived: since Ready, in ms: first piece %.1f, last piece %.1f, admitted %.1f",
            plan.request.request_id,
            1e3 * (plan.first_piece_s - plan.since_s),
            1e3 * (plan.last_piece_s - plan.since_s),
            1e3 * (self._clock() - plan.since_s),
        )
        self._untold.append((plan.peer, Admitted(*plan.key)))
        return Arrived(plan.request, last.token_ids)

    def _refuse(self, plan: ReceivePlan, code: str, message: str) -> Ended:
        """Fails the request for what the prefill side did, and tells it."""
        error = ErrorInfo(code, message, True, 503)
        self._cancel(plan.peer, plan.key, error)
        return self._fail(plan, error)

    def _fail(self, plan: ReceivePlan, error: ErrorInfo) -> Ended:
        self._forget(plan)
        return Ended(plan.key, error)

    def _forget(self, plan: ReceivePlan) -> None:
        del self._plans[plan.key]
        self._moving.pop(plan.key, None)
        self._recent.add(plan.key)
        if plan.scattering:
            self._store.withdraw(item.moved for item in plan.scattering)  # its pages are given away

    def _cancel(self, peer: PeerRef, key: OwnerKey, error: ErrorInfo) -> None:
        with contextlib.suppress(PhloemError):  # a channel that broke meanwhile tells both sides by itself
            if self._channels.is_open(peer, "decode"):
                self._channels.send_cancel(peer, Cancel(*key, error.code, error.message), "decode")


def _cancelled(peer: PeerRef, why: str) -> ErrorInfo:
    return ErrorInfo(
        "handover_cancelled", f"prefill worker {peer.worker_id} gave the request up: {why}", True, 503
    )
