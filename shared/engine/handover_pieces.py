"""Sends what is computed of the prompts that are handed over: layers of pages, in pieces, as slots allow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from phloem.shared.engine.handover import Channels, PageStore
from phloem.shared.engine.layer_groups import next_piece_bytes
from phloem.shared.engine.page_layers import PageLayers, Span
from phloem.shared.engine.send_plan import Chunk, Draft, SendPlan
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.transfer import Piece
from phloem.shared.transfer.config import STAGING_BYTES
from phloem.shared.transfer.pending import Pending
from phloem.shared.transfer.staging import StagingSlot

_FIRST_TOGETHER = 2


class _Ready(NamedTuple):
    """A piece that goes now."""

    draft: Draft
    slot: StagingSlot


class PieceSender:
    """Called from the engine's thread only, which launches gathers and posts sends ahead of the device.

    The first two pieces are announced, gathered and posted before the others are even planned: nothing
    crosses until then, and both sides must have posted the second one when the first one has crossed. The
    others are announced together while these cross, so that decode's host prepares for all of them. A
    request that is computed before decode has room for it has the first two planned by then.
    """

    def __init__(self, channels: Channels, store: PageStore, clock: Callable[[], float]) -> None:
        self._channels = channels
        self._store = store
        self._clock = clock
        self._awaited: list[Pending] = []  # marks that `send_computed` found not done
        self._was_told = False  # since the last `send_computed`
        self._slot_bytes = STAGING_BYTES  # of the slot that was acquired last, and as a rule of all
        self.num_pages_sent = 0
        self.num_bytes_sent = 0

    @property
    def has_news(self) -> bool:
        """Another `send_computed` may send something: the device has done what the last one found undone, or
        the peer has told of something since."""
        return self._was_told or any(mark.done() for mark in self._awaited)

    def tell(self) -> None:
        """A peer is ready for a request, or a staging slot is free."""
        self._was_told = True

    def draft(self, plan: SendPlan) -> None:
        """Plans the first pieces of a request that is computed and of which nothing has gone, so that its
        go-ahead waits for less."""
        whole = plan.whole(self._store.num_layers)
        if whole is None:
            return
        gone = PageLayers(whole.num_pages, self._store.num_layers, 0)
        before = 0
        while len(plan.drafts) < _FIRST_TOGETHER and (run := gone.next_run(whole.num_pages, gone.num_layers)):
            plan.drafts.append(self._next(plan, run, self._slot_bytes, before))
            gone.note(plan.drafts[-1].span)
            before = plan.drafts[-1].piece.num_bytes

    def send_computed(self, plans: Iterable[SendPlan]) -> None:
        """Whatever is computed, wanted and has a slot; a plan whose channel is lost gets its error."""
        self._awaited, self._was_told = [], False
        for plan in plans:
            if plan.gone is not None and plan.error is None:
                try:
                    slots = self._send_drafts(plan, plan.gone)
                    computed = self._computed(plan, plan.gone, slots)
                    self._send(plan, *_apart(islice(computed, _FIRST_TOGETHER)))
                    self._send(plan, *_apart(computed))
                except PhloemError as error:
                    plan.error = error.info

    def _computed(self, plan: SendPlan, gone: PageLayers, slots: list[StagingSlot]) -> Iterator[_Ready]:
        """What may go now, in `slots` first; it counts as gone."""
        while plan.chunks:
            chunk = plan.chunks[0]
            if plan.request.num_computed_tokens < chunk.num_tokens:
                return  # retracted: its pages are gone
            yield from self._computed_groups(plan, gone, chunk, slots)
            if not chunk.is_sent:
                return
            plan.chunks.popleft()

    def _computed_groups(
        self, plan: SendPlan, gone: PageLayers, chunk: Chunk, slots: list[StagingSlot]
    ) -> Iterator[_Ready]:
        """The groups of layers that are computed, while there are staging slots."""
        while chunk.marks:
            layer_end, mark = chunk.marks[0]
            if not mark.done():
                self._awaited.append(mark)
                return
            while (run := gone.next_run(chunk.num_pages, layer_end)) is not None:
                slot = slots.pop(0) if slots else self._channels.acquire_slot(plan.peer)
                if slot is None:
                    return
                yield self._ready(plan, gone, run, slot)
            chunk.marks.popleft()
            chunk.is_sent = layer_end == self._store.num_layers

    def _ready(self, plan: SendPlan, gone: PageLayers, run: Span, slot: StagingSlot) -> _Ready:
        """The next piece of `run`; it counts as gone."""
        self._slot_bytes = slot.tensor.numel()
        draft = self._next(plan, run, self._slot_bytes, plan.latest_piece_bytes)
        gone.note(draft.span)
        plan.latest_piece_bytes = draft.piece.num_bytes
        return _Ready(draft, slot)

    def _next(self, plan: SendPlan, run: Span, slot_bytes: int, before: int) -> Draft:
        layer_page_bytes = self._store.layer_page_bytes
        size = next_piece_bytes(run.layers_of_pages() * layer_page_bytes, slot_bytes, before)
        span = run.head(size, layer_page_bytes)
        num_bytes = span.layers_of_pages() * layer_page_bytes
        piece = Piece(plan.request.request_id, plan.request.attempt, *span, num_bytes)
        return Draft(piece, span, before)

    def _send_drafts(self, plan: SendPlan, gone: PageLayers) -> list[StagingSlot]:
        """As many as there are slots for; nothing has gone before. They are noted when they are posted:
        nothing crosses until then. Slots that are too small are for who plans anew, and needs them all."""
        drafts, plan.drafts = plan.drafts, []
        if not drafts or plan.request.num_computed_tokens < plan.chunks[0].num_tokens:
            return []  # none, or retracted: its pages are gone
        slots = [slot for _ in drafts if (slot := self._channels.acquire_slot(plan.peer)) is not None]
        if slots and max(draft.piece.num_bytes for draft in drafts) > slots[0].tensor.numel():
            return slots
        self._send(plan, drafts[: len(slots)], slots)
        for draft in drafts[: len(slots)]:
            gone.note(draft.span)
            plan.latest_piece_bytes = draft.piece.num_bytes
        return []

    def _send(self, plan: SendPlan, drafts: list[Draft], slots: list[StagingSlot]) -> None:
        """One slot for each."""
        if not slots:
            return
        self._channels.announce(plan.peer, [draft.piece for draft in drafts], slots)
        for (piece, span, before), slot in zip(drafts, slots, strict=True):
            gathered = self._store.gather(
                span.of(plan.request.page_ids),
                span.layer_start,
                span.layer_end,
                slot.tensor,
                before,
            )
            self._channels.send_piece(plan.peer, piece, slot, gathered)
            plan.num_pieces += 1
            plan.times.last_piece_s = self._clock()
            plan.times.first_piece_s = plan.times.first_piece_s or plan.times.last_piece_s
            self.num_bytes_sent += piece.num_bytes
            self.num_pages_sent += span.num_pages if span.layer_end == self._store.num_layers else 0


def _apart(ready: Iterable[_Ready]) -> tuple[list[Draft], list[StagingSlot]]:
    together = list(ready)
    return [draft for draft, _ in together], [slot for _, slot in together]
