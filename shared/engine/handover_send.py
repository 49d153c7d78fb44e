"""The prefill side of hand-overs: sends pages as they are computed, then token 0.

A plan lives from the request's submission to its end:

    begin -> (Ready from the decode side) -> pieces as chunks are computed -> token made -> Last -> done

Pages that the decode side holds are never sent. The request keeps its pages until `pump` reports it done.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable

from phloem.shared.engine.handover import Channels, Ended, PageStore, RecentKeys, next_span, span_bytes
from phloem.shared.engine.kv_pool import OwnerKey
from phloem.shared.engine.requests import Request, Status
from phloem.shared.errors import ErrorInfo, PhloemError
from phloem.shared.protocol.session import PeerRef
from phloem.shared.protocol.transfer import Cancel, Last, Piece, Ready

_MAX_EARLY = 4096
_STARVED_S = 1.0  # a request that decode has room for waits at most this long for pages held in vain


class _SendPlan:
    def __init__(self, request: Request, peer: PeerRef) -> None:
        self.request = request
        self.peer = peer
        self.is_ready = False
        self.ready_at_s = 0.0
        self.page = 0  # next page to send
        self.layer = 0  # next layer of that page
        self.num_pieces = 0
        self.made: list[int] | None = None  # the tokens made here, once the prompt is computed
        self.made_at_s = 0.0


class HandoverSender:
    """All hand-overs that this engine is the prefill side of. Called from the engine's thread only."""

    def __init__(
        self,
        channels: Channels,
        store: PageStore,
        page_size: int,
        *,
        timeout_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._channels = channels
        self._store = store
        self._page_size = page_size
        self._timeout_s = timeout_s
        self._clock = clock
        self._plans: dict[OwnerKey, _SendPlan] = {}
        self._early: OrderedDict[OwnerKey, tuple[PeerRef, Ready]] = OrderedDict()
        self._recent = RecentKeys()
        self.num_pages_sent = 0
        self.num_bytes_sent = 0

    @property
    def active(self) -> bool:
        return bool(self._plans)

    def begin(self, request: Request) -> None:
        """A request of phase "prefill" was accepted."""
        assert request.peer is not None
        plan = self._plans[request.key] = _SendPlan(request, request.peer)
        early = self._early.pop(request.key, None)
        if early is not None and early[0] == plan.peer:
            self._start(plan, early[1])

    def on_ready(self, peer: PeerRef, message: Ready) -> None:
        """The decode side has reserved pages. It may say so before our own submission arrives."""
        key = (message.request_id, message.attempt)
        plan = self._plans.get(key)
        if plan is not None and plan.peer == peer:
            self._start(plan, message)
        elif key in self._recent or plan is not None:
            self._cancel(peer, key, "not_here", "the request has ended on the prefill side")
        else:
            self._early[key] = (peer, message)
            if len(self._early) > _MAX_EARLY:
                self._early.popitem(last=False)

    def tokens_made(self, request: Request, token_ids: list[int]) -> None:
        """The whole prompt is computed; `token_ids` go along with the last piece."""
        plan = self._plans.get(request.key)
        if plan is not None:
            plan.made = token_ids
            plan.made_at_s = self._clock()

    def drop(self, key: OwnerKey, code: str, message: str = "") -> None:
        """The request ended here for another reason: the decode side is told, nothing more is sent."""
        self._recent.add(key)
        self._early.pop(key, None)
        plan = self._plans.pop(key, None)
        if plan is not None:
            self._cancel(plan.peer, key, code, message)

    def on_cancel(self, peer: PeerRef, key: OwnerKey) -> Ended | None:
        """The decode side gave the request up."""
        plan = self._plans.get(key)
        if plan is None or plan.peer != peer:
            return None
        del self._plans[key]
        self._recent.add(key)
        error = ErrorInfo("handover_cancelled", "the decode worker gave the request up", True, 503)
        return Ended(key, error)

    def on_lost(self, peer: PeerRef, error: ErrorInfo) -> list[Ended]:
        """The channel broke: what was promised to this peer fails, retryably."""
        lost = [plan for plan in self._plans.values() if plan.peer == peer and plan.is_ready]
        for plan in lost:
            del self._plans[plan.request.key]
            self._recent.add(plan.request.key)
        self._early = OrderedDict((k, v) for k, v in self._early.items() if v[0] != peer)
        lost_error = ErrorInfo("channel_lost", f"KV channel to {peer.worker_id}: {error.message}", True, 503)
        return [Ended(plan.request.key, lost_error) for plan in lost]

    def pump(self) -> list[Ended]:
        """Sends whatever is computed, wanted and has a staging slot; returns the hand-overs that are done."""
        done: list[Ended] = []
        for plan in list(self._plans.values()):
            try:
                if plan.is_ready and self._send_computed(plan) and plan.made is not None:
                    self._send_last(plan)
                    done.append(Ended(plan.request.key, None))
            except PhloemError as error:
                done.append(Ended(plan.request.key, error.info))
        for ended in done:
            self._plans.pop(ended.key)
            self._recent.add(ended.key)
        return done + self._expired()

    def in_the_way(self) -> Request | None:
        """A request that must give its pages up: it waits for room at its decode worker, and nothing moves
        because others, for which decode holds room, wait here for pages. Without this the two workers could
        wait for each other until a time-out; the youngest such request is the one. Ask only when requests
        wait here for pages, not for their turn."""
        ready = [plan for plan in self._plans.values() if plan.is_ready]
        before_s = self._clock() - _STARVED_S
        starved = any(plan.ready_at_s < before_s for plan in ready)
        if not starved or any(plan.request.status is not Status.WAITING for plan in ready):
            return None
        held = [plan.request for plan in self._plans.values() if plan.made is not None and not plan.is_ready]
        return held[-1] if held else None

    # -- inside ----------------------------------------------------------------------------------------

    def _start(self, plan: _SendPlan, ready: Ready) -> None:
        plan.is_ready = True
        plan.ready_at_s = self._clock()
        plan.page = ready.num_held_pages

    def _send_computed(self, plan: _SendPlan) -> bool:
        """Sends the pages computed so far; True when none of them is left."""
        request = plan.request
        num_pages = request.num_computed_tokens // self._page_size
        if plan.made is not None:
            num_pages = -(-request.num_computed_tokens // self._page_size)
        while plan.page < num_pages:
            slot = self._channels.acquire_slot(plan.peer)
            if slot is None:
                return False
            span, next_page, next_layer = next_span(
                self._store, slot.tensor.numel(), plan.page, plan.layer, num_pages
            )
            num_bytes = span_bytes(self._store, span)
            page_ids = request.page_ids[span.page_start : span.page_start + span.num_pages]
            digest = self._store.gather(page_ids, span.layer_start, span.layer_end, slot.tensor[:num_bytes])
            self._channels.send_piece(
                plan.peer, Piece(request.request_id, request.attempt, *span, num_bytes, digest), slot
            )
            plan.page, plan.layer = next_page, next_layer
            plan.num_pieces += 1
            self.num_bytes_sent += num_bytes
            self.num_pages_sent += span.num_pages if span.layer_end == self._store.num_layers else 0
        return True

    def _send_last(self, plan: _SendPlan) -> None:
        assert plan.made is not None
        request = plan.request
        self._channels.send_last(
            plan.peer, Last(request.request_id, request.attempt, plan.num_pieces, plan.made)
        )

    def _expired(self) -> list[Ended]:
        """Requests whose decode side has not become ready in time since token 0 was made."""
        before_s = self._clock() - self._timeout_s
        late = [
            plan
            for plan in self._plans.values()
            if plan.made is not None and not plan.is_ready and plan.made_at_s < before_s
        ]
        error = ErrorInfo("handover_timeout", "the decode worker had no room in time", True, 503)
        for plan in late:
            self.drop(plan.request.key, error.code, error.message)
        return [Ended(plan.request.key, error) for plan in late]

    def _cancel(self, peer: PeerRef, key: OwnerKey, code: str, message: str) -> None:
        # A channel that broke meanwhile tells both sides by itself.
        with contextlib.suppress(PhloemError):
            if self._channels.is_open(peer, "prefill"):
                self._channels.send_cancel(peer, Cancel(*key, code, message), "prefill")
