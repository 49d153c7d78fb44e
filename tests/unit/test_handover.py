"""Hand-overs that go well: what is sent, and in which order."""

from __future__ import annotations

import pytest

from phloem.shared.engine.handover import RecentKeys
from phloem.shared.errors import ErrorInfo
from phloem.shared.protocol.session import PeerRef
from phloem.shared.protocol.transfer import Cancel, Last, Ready
from phloem.shared.transfer.events import PieceReceived, ReadyReceived
from tests.support.handover_wire import D, P, Wire
from tests.support.handover_world import PAGE, HandoverWorld, assert_handed_over

PAGE_BYTES = 4 * 8  # layers x bytes of a page in one layer


@pytest.mark.parametrize("num_held_pages", [0, 1, 2, 3])
def test_only_pages_that_decode_lacks_are_sent(num_held_pages: int) -> None:
    world = HandoverWorld()
    job = world.job(num_tokens=10)  # 3 pages, the last not full
    job.begin()
    job.reserve(num_held_pages)
    job.make_token()
    world.run()
    assert_handed_over(world, job)
    missing = 3 - num_held_pages
    assert world.sender.num_pages_sent == world.receiver.num_pages_received == missing
    assert world.sender.num_bytes_sent == world.receiver.num_bytes_received == missing * PAGE_BYTES


@pytest.mark.parametrize("first", ["submit", "ready"])
def test_submission_and_ready_may_come_in_either_order(first: str) -> None:
    world = HandoverWorld()
    job = world.job()
    if first == "submit":
        job.begin()
    job.reserve(1)
    world.wire.pass_all()
    if first == "ready":
        job.begin()
    job.make_token(12)
    world.run()
    assert_handed_over(world, job, 12)
    assert world.sender.num_pages_sent == 2


def test_full_pages_go_while_the_rest_is_computed_and_the_partial_one_with_the_last_chunk() -> None:
    world = HandoverWorld()
    job = world.job(num_tokens=10)
    job.begin()
    job.reserve()
    for num_tokens, num_pages in ((0, 0), (PAGE - 1, 0), (PAGE, 1), (PAGE + 1, 1), (9, 2), (10, 3)):
        job.compute(num_tokens)
        world.run()
        assert world.receiver.num_pages_received == num_pages
        assert job.key not in world.admitted
    job.make_token()
    world.run()
    assert world.receiver.num_pages_received == 3
    assert_handed_over(world, job)


def test_token_waits_for_the_decode_side() -> None:
    world = HandoverWorld()
    job = world.job()
    job.begin()
    job.make_token()
    world.run()
    assert world.sender.num_pages_sent == 0 and job.key not in world.sent
    job.reserve()
    world.run()
    assert_handed_over(world, job)


def test_pages_share_slots_and_a_large_page_goes_in_groups_of_layers() -> None:
    for slot_bytes, pieces in (
        (3 * PAGE_BYTES, [(0, 3, 0, 4)]),
        (2 * PAGE_BYTES + 5, [(0, 2, 0, 4), (2, 1, 0, 4)]),
        (24, [(page, 1, *layers) for page in range(3) for layers in ((0, 3), (3, 4))]),
        (8, [(page, 1, layer, layer + 1) for page in range(3) for layer in range(4)]),
    ):
        world = HandoverWorld(Wire(slot_bytes=slot_bytes, num_slots=12))
        job = world.job(num_tokens=10)
        job.begin()
        job.reserve()
        world.wire.pass_all()
        job.make_token()
        world.pump()
        headers = [event.header for event in world.wire.to_decode if isinstance(event, PieceReceived)]
        assert [(h.page_start, h.num_pages, h.layer_start, h.layer_end) for h in headers] == pieces
        world.run()
        assert_handed_over(world, job)
        assert world.receiver.num_pages_received == 3


def test_sender_goes_on_when_a_slot_is_available_again() -> None:
    world = HandoverWorld(Wire(slot_bytes=24, num_slots=2))
    jobs = [world.job(f"r{index}") for index in range(3)]
    for job in jobs:
        job.begin()
        job.reserve()
        job.make_token()
    world.wire.pass_all()
    world.pump()
    assert len(world.wire.to_decode) == 2 and not world.sent
    world.pump()
    assert len(world.wire.to_decode) == 2
    world.run()
    for job in jobs:
        assert_handed_over(world, job)


def test_ready_is_sent_when_the_channel_opens() -> None:
    world = HandoverWorld(Wire(is_open=False))
    job = world.job()
    job.begin()
    job.make_token()
    job.reserve()
    world.run()
    assert not world.sent
    world.wire.open()
    world.run()
    assert_handed_over(world, job)


# -- strangers and bounds --------------------------------------------------------------------------------


def test_messages_of_another_epoch_or_worker_change_nothing() -> None:
    world = HandoverWorld()
    job = world.job()
    job.begin()
    job.reserve()
    job.make_token()
    old = PeerRef(P.worker_id, P.epoch + 1)
    assert world.receiver.on_cancel(old, Cancel(*job.key)) is None
    assert world.receiver.on_last(old, Last(*job.key, 0, [1])) is None
    assert world.sender.on_cancel(old, job.key) is None
    assert (
        world.receiver.on_lost(old, ErrorInfo("x", "")) == world.sender.on_lost(old, ErrorInfo("x", "")) == []
    )
    world.sender.on_ready(old, Ready(*job.key, 0))
    world.run()
    assert_handed_over(world, job)


def test_what_is_remembered_of_ended_and_early_requests_is_bounded() -> None:
    keys = RecentKeys()
    for index in range(10_000):
        keys.add((f"{index}", 1))
    assert ("9999", 1) in keys and ("0", 1) not in keys
    world = HandoverWorld()
    for index in range(5000):
        world.wire.deliver_to_prefill(ReadyReceived(D, Ready(f"{index}", 1, 0)))
    assert len(world.sender._early) == 4096
