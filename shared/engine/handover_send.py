"""The prefill side of hand-overs: sends pages layer by layer as they are computed, then token 0.

A plan lives from the request's submission to its end:

    begin -> (Ready from the decode side) -> pieces while steps compute -> token made -> Last -> done

`watch` is asked before a step is launched: the runner then tells, group of layers by group, what lies in the
request's pages, and `pump` sends what the device has done by now. Pages that the decode side holds are never
sent. The request keeps its pages until `pump` reports it done.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

from phloem.shared.engine.exposure import Exposure
from phloem.shared.engine.handover import Channels, Ended, PageStore, RecentKeys
from phloem.shared.engine.handover_pieces import PieceSender
from phloem.shared.engine.kv_pool import OwnerKey
from phloem.shared.engine.layer_groups import PrefillStep, layer_groups
from phloem.shared.engine.page_layers import PageLayers
from phloem.shared.engine.requests import Request, Status
from phloem.shared.engine.send_plan import Chunk, SendPlan
from phloem.shared.engine.step_plan import Row
from phloem.shared.engine.step_runner import LayerWatch
from phloem.shared.errors import ErrorInfo, PhloemError
from phloem.shared.protocol.session import PeerRef
from phloem.shared.protocol.transfer import Cancel, Last, Ready
from phloem.shared.transfer.pending import Pending
from phloem.shared.transfer.stats import SendRates

_MAX_EARLY = 4096
_EXPECTED_S = 0.005  # decode answers within this time, or has no room yet
_NOT_MEASURED = SendRates()
_STARVED_S = 1.0  # a request that decode has room for waits at most this long for pages held in vain


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
        self._pieces = PieceSender(channels, store, clock)
        self._page_size = page_size
        self._timeout_s = timeout_s
        self._clock = clock
        self._plans: dict[OwnerKey, SendPlan] = {}
        self._early: OrderedDict[OwnerKey, tuple[PeerRef, Ready]] = OrderedDict()
        self._cancelled_early = RecentKeys()
        self._recent = RecentKeys()
        self._expected_until_s = 0.0
        self.exposure = Exposure()

    @property
    def active(self) -> bool:
        return bool(self._plans)

    @property
    def has_news(self) -> bool:
        """Another `pump` may send something: the device has done what the last one found undone, or a peer
        has become ready or has room."""
        return self._pieces.has_news

    @property
    def expects_ready(self) -> bool:
        """A request was computed a moment ago, and its go-ahead is all that it waits for. Who has slept for
        longer takes three times as long to send its first pieces."""
        return self._clock() < self._expected_until_s

    @property
    def num_pages_sent(self) -> int:
        return self._pieces.num_pages_sent

    @property
    def num_bytes_sent(self) -> int:
        return self._pieces.num_bytes_sent

    def begin(self, request: Request) -> None:
        """A request of phase "prefill" was accepted."""
        assert request.peer is not None
        plan = self._plans[request.key] = SendPlan(request, request.peer, self._clock())
        if request.key in self._cancelled_early:
            plan.error = _GIVEN_UP
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

    def on_slot(self) -> None:
        """A staging slot is free that was missing."""
        self._pieces.tell()

    def watch(
        self, rows: Sequence[Row], *, tokens_per_s: float = 0.0, rates: SendRates = _NOT_MEASURED
    ) -> LayerWatch | None:
        """For the launch of a step: how it shall tell what lies in the pages; None when nobody wants to know.

        The rows count as computed in their requests by now. The rates are the measured ones of prefill (zero:
        not yet) and of the channels: of the step's peers the slowest is what its groups must suit.
        """
        chunks = [
            (plan, self._chunk(plan, row)) for row in rows if (plan := self._plans.get(row.request.key))
        ]
        if not chunks:
            return None
        num_tokens = sum(row.num_tokens for row in rows)
        pages = -(-num_tokens // self._page_size)
        groups = layer_groups(
            PrefillStep(
                self._store.num_layers,
                pages * self._store.layer_page_bytes,
                num_tokens,
                tokens_per_s,
                rates.slowest(plan.peer for plan, _ in chunks),
            )
        )
        return LayerWatch(groups, partial(self._reached, chunks))

    def tokens_made(self, request: Request, token_ids: list[int]) -> None:
        """The whole prompt is computed; `token_ids` go along with the last piece."""
        plan = self._plans.get(request.key)
        if plan is not None:
            plan.made = token_ids
            plan.times.made_s = self._clock()
            if not plan.is_ready:
                self._pieces.draft(plan)
                self._expected_until_s = plan.times.made_s + _EXPECTED_S

    def drop(self, key: OwnerKey, code: str, message: str = "") -> None:
        """The request ended here for another reason: the decode side is told, nothing more is sent."""
        self._recent.add(key)
        self._early.pop(key, None)
        plan = self._plans.pop(key, None)
        if plan is not None:
            self._cancel(plan.peer, key, code, message)

    def on_cancel(self, peer: PeerRef, key: OwnerKey) -> Ended | None:
        """The decode side gave the request up; maybe before our own submission arrives."""
        plan = self._plans.get(key)
        if plan is None and key not in self._recent:
            self._early.pop(key, None)
            self._cancelled_early.add(key)
        if plan is None or plan.peer != peer:
            return None
        del self._plans[key]
        self._recent.add(key)
        return Ended(key, _GIVEN_UP)

    def on_lost(self, peer: PeerRef, error: ErrorInfo) -> list[Ended]:
        """The channel broke: what was promised to this peer fails, retryably."""
        lost = [plan for plan in self._plans.values() if plan.peer == peer and plan.is_ready]
        for plan in lost:
            del self._plans[plan.request.key]
            self._recent.add(plan.request.key)
        self._early = OrderedDict((k, v) for k, v in self._early.items() if v[0] != peer)
        lost_error = ErrorInfo("channel_lost", f"KV channel to {peer.worker_id}: {error.message}", True, 503)
        return [Ended(plan.request.key, lost_error) for plan in lost]

    def on_admitted(self, key: OwnerKey, at_s: float) -> None:
        """The decode side generates: its word, at `at_s`, ends what the client can see of the transfer."""
        self.exposure.admitted(key, at_s)

    def pump(self) -> list[Ended]:
        """Sends whatever is computed, wanted and has a staging slot; returns the hand-overs that are done."""
        self._pieces.send_computed(self._plans.values())
        done: list[Ended] = []
        for plan in self._plans.values():
            if plan.error is None and plan.is_sent:
                self._send_last(plan)
            if plan.error is not None or plan.is_sent:
                done.append(Ended(plan.request.key, plan.error))
        if done:
            self._store.fence()  # the pages of these requests may still be read
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
        starved = any(plan.times.ready_s < before_s for plan in ready)
        if not starved or any(plan.request.status is not Status.WAITING for plan in ready):
            return None
        held = [plan.request for plan in self._plans.values() if plan.made is not None and not plan.is_ready]
        return held[-1] if held else None

    # -- what is computed ------------------------------------------------------------------------------

    def _chunk(self, plan: SendPlan, row: Row) -> Chunk:
        if row.start < plan.num_launched_tokens:
            plan.recompute()  # what this step computes is not what was there
        plan.times.launched_s = plan.times.launched_s or self._clock()
        end = plan.num_launched_tokens = row.start + row.num_tokens
        # The last page may be partial: what follows in it is computed on the decode side.
        num_pages = -(-end // self._page_size) if row.samples else end // self._page_size
        chunk = Chunk(end, num_pages)
        plan.chunks.append(chunk)
        return chunk

    def _reached(self, chunks: list[tuple[SendPlan, Chunk]], layer_end: int, mark: Pending) -> None:
        """The runner has launched all that writes layers [0, layer_end)."""
        for _, chunk in chunks:
            chunk.marks.append((layer_end, mark))
        # Done at once: the device computes in our own thread, and the next layers wait for us. News: it has
        # got on with the step before while this one is being launched, or what of that is there may go now.
        if mark.done() or self.has_news:
            self._pieces.send_computed(self._plans.values())

    def _start(self, plan: SendPlan, ready: Ready) -> None:
        if plan.gone is not None:
            return
        plan.times.ready_s = self._clock()
        self._expected_until_s = 0.0
        num_pages = -(-plan.request.num_submitted_tokens // self._page_size)
        plan.gone = PageLayers(num_pages, self._store.num_layers, min(ready.num_held_pages, num_pages))
        if ready.num_held_pages:
            plan.drafts = []
        self._pieces.tell()

    # -- how it ends -----------------------------------------------------------------------------------

    def _send_last(self, plan: SendPlan) -> None:
        assert plan.made is not None
        request = plan.request
        last = Last(request.request_id, request.attempt, plan.num_pieces, plan.made)
        try:
            self._channels.send_last(plan.peer, last)
        except PhloemError as error:
            plan.error = error.info
        else:
            plan.times.last_s = self._clock()
            self.exposure.handed_over(request.key, plan.times)

    def _expired(self) -> list[Ended]:
        """Requests whose decode side has not become ready in time since token 0 was made."""
        before_s = self._clock() - self._timeout_s
        late = [
            plan
            for plan in self._plans.values()
            if plan.made is not None and not plan.is_ready and plan.times.made_s < before_s
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


_GIVEN_UP = ErrorInfo("handover_cancelled", "the decode worker gave the request up", True, 503)
