"""Requests that are computed before decode has room: their first pieces are planned by then."""

from __future__ import annotations

import pytest

from phloem.shared.engine import layer_groups
from phloem.shared.transfer.events import PieceReceived
from tests.support.handover_wire import HeldBack, Wire
from tests.support.handover_world import HandoverWorld, Job, assert_handed_over

PAGE_BYTES = 4 * 8  # layers x bytes of a page in one layer


def world_with_slots(num_pages: int, num_slots: int = 4) -> HandoverWorld:
    """Slots of so many pages; the sender knows how large they are, from a request before."""
    world = HandoverWorld(Wire(slot_bytes=num_pages * PAGE_BYTES, num_slots=num_slots))
    before = computed(world, "before")
    before.reserve()
    world.wire.pass_all()
    world.run()
    assert_handed_over(world, before)
    return world


def computed(world: HandoverWorld, name: str = "r", num_tokens: int = 24) -> Job:
    """In chunks of two pages; decode has no room yet."""
    job = world.job(name, num_tokens)
    job.begin()
    for num_computed in range(8, num_tokens, 8):
        job.compute(num_computed)
    job.make_token()
    world.pump()
    return job


def go_ahead(world: HandoverWorld, job: Job, num_held_pages: int = 0) -> list[PieceReceived]:
    """What leaves at once."""
    job.reserve(num_held_pages)
    world.wire.pass_all()
    world.pump()
    return [event for event in world.wire.to_decode if isinstance(event, PieceReceived)]


def pages_of(pieces: list[PieceReceived]) -> list[tuple[int, int]]:
    return [(piece.header.page_start, piece.header.num_pages) for piece in pieces]


def assert_fits_other_slots(world: HandoverWorld, job: Job, num_pages: int) -> None:
    """The channel is lost, and opens again with slots of so many pages: no piece is larger, and all come."""
    world.wire.slot_bytes = num_pages * PAGE_BYTES
    world.wire.lose()
    world.wire.open()
    pieces = go_ahead(world, job)
    assert all(piece.header.num_bytes <= num_pages * PAGE_BYTES for piece in pieces)
    world.run()
    assert_handed_over(world, job)


def test_chunks_that_are_all_computed_go_as_one() -> None:
    world = world_with_slots(num_pages=4)
    job = computed(world)
    assert pages_of(go_ahead(world, job)) == [(0, 4), (4, 2)]
    world.run()
    assert_handed_over(world, job)


@pytest.mark.parametrize("num_held_pages", [1, 2, 5, 6, 9])
def test_pages_that_decode_holds_are_planned_anew(num_held_pages: int) -> None:
    world = world_with_slots(num_pages=4)
    job = computed(world)
    pieces = go_ahead(world, job, min(num_held_pages, 6))
    assert sum(piece.header.num_pages for piece in pieces) == max(0, 6 - num_held_pages)
    world.run()
    assert_handed_over(world, job)


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_what_has_no_slot_goes_when_there_is_one(num_slots: int) -> None:
    world = world_with_slots(num_pages=1, num_slots=num_slots)
    job = computed(world)
    assert len(go_ahead(world, job)) == num_slots
    world.run()
    assert_handed_over(world, job)


@pytest.mark.parametrize(("usual", "these"), [(4, 1), (1, 4), (2, 3)])
def test_slots_of_another_size_than_was_planned_for(usual: int, these: int) -> None:
    world = world_with_slots(num_pages=usual)
    assert_fits_other_slots(world, computed(world), these)


@pytest.mark.parametrize("these", [1, 2, 3, 4])
@pytest.mark.parametrize("num_slots", [1, 2, 4])
@pytest.mark.parametrize("num_tokens", [8, 12, 16, 20, 24, 32, 60])
def test_slots_that_only_the_first_draft_fits(
    monkeypatch: pytest.MonkeyPatch, num_tokens: int, num_slots: int, these: int
) -> None:
    """The second one is larger."""
    monkeypatch.setattr(layer_groups, "FIRST_PIECE_BYTES", PAGE_BYTES)
    monkeypatch.setattr(layer_groups, "LAST_PIECE_BYTES", PAGE_BYTES)
    world = world_with_slots(num_pages=4, num_slots=num_slots)
    assert_fits_other_slots(world, computed(world, num_tokens=num_tokens), these)


def test_second_draft_says_what_crosses_before_it() -> None:
    world = world_with_slots(num_pages=4)
    job = computed(world)
    world.prefill_store.beside.clear()
    go_ahead(world, job)
    assert world.prefill_store.beside == [0, 4 * PAGE_BYTES]


def test_nothing_is_drafted_before_the_device_has_computed_it() -> None:
    world = world_with_slots(num_pages=4)
    job = world.job("r", 8)
    job.begin()
    watch = job.launch(8)
    assert watch is not None
    mark = HeldBack()
    watch.all_at(mark)
    job.make_token()
    assert not go_ahead(world, job)
    mark.is_done = True
    world.run()
    assert_handed_over(world, job)


def test_retracted_request_sends_what_was_computed_again() -> None:
    world = world_with_slots(num_pages=4)
    job = computed(world)
    job.retract(first_page=100)
    assert not go_ahead(world, job)
    job.make_token()
    world.run()
    assert_handed_over(world, job)


def test_go_ahead_is_expected_for_a_moment() -> None:
    world = HandoverWorld()

    def expects() -> bool:
        return world.sender.expects_ready

    early, late = world.job("early", 8), world.job("late", 8)
    for job in (early, late):
        job.begin()
    early.reserve()
    world.wire.pass_all()
    early.make_token()
    assert not expects(), "it has come before"
    late.make_token()
    assert expects()
    world.pass_time(0.01)
    assert not expects(), "decode has no room yet"
    world.run()
    late.reserve()
    world.wire.pass_all()
    assert not expects()
    world.run()
    for job in (early, late):
        assert_handed_over(world, job)
