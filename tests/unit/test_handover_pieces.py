"""In which order a request's pieces are planned, announced, gathered and posted, and what is said of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from phloem.shared.protocol.transfer import Piece
from phloem.shared.transfer.events import AdmittedReceived
from tests.support.handover_wire import Wire
from tests.support.handover_world import HandoverWorld, Job, assert_handed_over

PAGE_BYTES = 4 * 8  # layers x bytes of a page in one layer


class _Spied(Wire):
    """A page a slot; `calls` are the sender's, in order."""

    def __init__(self) -> None:
        super().__init__(slot_bytes=PAGE_BYTES, num_slots=4)
        self.calls: list[str] = []

    def acquire(self) -> Any:
        slot = super().acquire()
        self.calls.append("slot" if slot is not None else "no slot")
        return slot

    def announce(self, pieces: Sequence[Piece], slots: Any) -> None:
        super().announce(pieces, slots)
        self.calls.append(f"announce {len(pieces)}")

    def send_piece(self, piece: Piece, slot: Any, gathered: Any) -> None:
        super().send_piece(piece, slot, gathered)
        self.calls.append("send")


def go_ahead(num_tokens: int) -> tuple[HandoverWorld, _Spied, Job]:
    """Of a request whose pages, of four tokens, are all computed."""
    wire = _Spied()
    world = HandoverWorld(wire)
    job = world.job(num_tokens=num_tokens)
    job.begin()
    job.make_token()
    job.reserve()
    wire.pass_all()
    return world, wire, job


def test_two_pieces_are_posted_before_the_others_are_planned() -> None:
    world, wire, job = go_ahead(num_tokens=16)
    world.pump()
    first, others = ["slot", "slot", "announce 2", "send", "send"], ["slot", "slot", "announce 2"]
    assert wire.calls == [*first, *others, "send", "send"]
    world.run()
    assert_handed_over(world, job)


def test_page_stores_are_told_what_crosses_while_they_move_pages() -> None:
    """On one side what was sent before, on the other one what is still to come."""
    world, _, job = go_ahead(num_tokens=12)
    world.run()
    assert_handed_over(world, job)
    assert world.prefill_store.beside == [0, PAGE_BYTES, PAGE_BYTES]
    assert world.decode_store.beside == [2 * PAGE_BYTES, PAGE_BYTES, 0]


def test_prefill_hears_of_the_admission_when_its_engine_tells_once() -> None:
    world, wire, _ = go_ahead(num_tokens=8)
    world.decode_store.holds_back = True
    world.run()
    world.decode_store.finish()
    arrived, failed = world.receiver.poll()
    assert len(arrived) == 1 and not failed and not wire.to_prefill, "the request goes first"
    world.receiver.tell_admitted()
    world.receiver.tell_admitted()
    (told,) = wire.to_prefill
    assert isinstance(told, AdmittedReceived)
    assert (told.message.request_id, told.message.attempt) == arrived[0].request.key


def test_admission_over_a_lost_channel_is_told_to_nobody() -> None:
    world, wire, _ = go_ahead(num_tokens=8)
    world.decode_store.holds_back = True
    world.run()
    world.decode_store.finish()
    arrived, _ = world.receiver.poll()
    wire.lose()
    world.receiver.tell_admitted()
    wire.open()
    world.receiver.tell_admitted()
    assert len(arrived) == 1 and not wire.to_prefill
