"""Sends what is computed of the prompts that are handed over: layers of pages, in pieces, as slots allow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from phloem.shared.engine.handover import Channels, PageStore
from phloem.shared.engine.layer_groups import next_piece_bytes
from phloem.shared.engine.page_layers import PageLayers, Span
from phloem.shared.engine.send_plan import Chunk, SendPlan
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.transfer import Piece
from phloem.shared.transfer.pending import Pending
from phloem.shared.transfer.staging import StagingSlot

_FIRST_TOGETHER = 2


class _Ready(NamedTuple):
    """A piece that goes now."""

    piece: Piece
    span: Span
    slot: StagingSlot
    before: int  # bytes of the piece that crosses meanwhile


class PieceSender:
    """Called from the engine's thread only, which launches gathers and posts sends ahead of the device.

    The first two pieces are announced, gathered and posted before the others are even planned: nothing
    crosses until then, and both sides must have posted the second one when the first one has crossed. The
    others are announced together while these cross, so that decode's host prepares for all of them.
    """

    def __init__(self, channels: Channels, store: PageStore, clock: Callable[[], float]) -> None:
        self._channels = channels
        self._store = store
        self._clock = clock
        self._awaited: list[Pending] = []  # marks that `send_computed` found not done
        self._was_told = False  # since the last `send_computed`
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

    def send_computed(self, plans: Iterable[SendPlan]) -> None:
        """Whatever is computed, wanted and has a slot; a plan whose channel is lost gets its error."""
        self._awaited, self._was_told = [], False
        for plan in plans:
            if plan.gone is not None and plan.error is None:
                try:
                    computed = self._computed(plan, plan.gone)
                    self._send(plan, list(islice(computed, _FIRST_TOGETHER)))
                    self._send(plan, list(computed))
                except PhloemError as error:
                    plan.error = error.info

    def _computed(self, plan: SendPlan, gone: PageLayers) -> Iterator[_Ready]:
        """What may go now; it counts as gone."""
        while plan.chunks:
            chunk = plan.chunks[0]
            if plan.request.num_computed_tokens < chunk.num_tokens:
                return  # retracted: its pages are gone
            yield from self._computed_groups(plan, gone, chunk)
            if not chunk.is_sent:
                return
            plan.chunks.popleft()

    def _computed_groups(self, plan: SendPlan, gone: PageLayers, chunk: Chunk) -> Iterator[_Ready]:
        """The groups of layers that are computed, while there are staging slots."""
        while chunk.marks:
            layer_end, mark = chunk.marks[0]
            if not mark.done():
                self._awaited.append(mark)
                return
            while (run := gone.next_run(chunk.num_pages, layer_end)) is not None:
                slot = self._channels.acquire_slot(plan.peer)
                if slot is None:
                    return
                yield self._ready(plan, gone, run, slot)
            chunk.marks.popleft()
            chunk.is_sent = layer_end == self._store.num_layers

    def _ready(self, plan: SendPlan, gone: PageLayers, run: Span, slot: StagingSlot) -> _Ready:
        layer_page_bytes, before = self._store.layer_page_bytes, plan.latest_piece_bytes
        size = next_piece_bytes(run.layers_of_pages() * layer_page_bytes, slot.tensor.numel(), before)
        span = run.head(size, layer_page_bytes)
        gone.note(span)
        num_bytes = plan.latest_piece_bytes = span.layers_of_pages() * layer_page_bytes
        more = span.layers_of_pages() < run.layers_of_pages()
        piece = Piece(plan.request.request_id, plan.request.attempt, *span, num_bytes, more=more)
        return _Ready(piece, span, slot, before)

    def _send(self, plan: SendPlan, ready: list[_Ready]) -> None:
        if not ready:
            return
        self._channels.announce(plan.peer, [item.piece for item in ready], [item.slot for item in ready])
        for piece, span, slot, before in ready:
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
