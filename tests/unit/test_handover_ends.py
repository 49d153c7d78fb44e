"""Hand-overs that end early: one side gives up, the channel breaks, or nobody answers."""

from __future__ import annotations

import pytest

from phloem.shared.protocol.transfer import Cancel, Last
from phloem.shared.transfer.events import CancelReceived, LastReceived, PieceReceived
from tests.support.handover_wire import D, P, Wire
from tests.support.handover_world import (
    TIMEOUT_S,
    HandoverWorld,
    assert_handed_over,
    assert_settled,
    error_of,
)

# -- one side gives the request up -----------------------------------------------------------------------


@pytest.mark.parametrize("reserved", ["before", "after"])
def test_decode_fails_at_once_when_the_request_ends_at_the_prefill_side(reserved: str) -> None:
    """Token 0 was the last one, or the client went away."""
    world = HandoverWorld()
    job = world.job()
    job.begin()
    if reserved == "before":
        job.reserve()
        world.wire.pass_all()
    job.compute(5)
    world.pump()
    job.drop_sent("finished")
    world.wire.pass_all()
    if reserved == "after":
        job.reserve()
    assert error_of(world.failed[job.key]) == ("handover_cancelled", True)
    world.run()
    assert_settled(world)


def test_prefill_ends_when_decode_gives_the_request_up() -> None:
    world = HandoverWorld()
    job = world.job()
    job.begin()
    job.reserve()
    job.compute(5)
    world.run()
    job.compute(8)
    world.pump()
    assert len(world.wire.to_decode) == 1
    job.drop_received()
    world.run()
    assert error_of(world.sent[job.key]) == ("handover_cancelled", True)
    assert not world.failed and not world.admitted
    assert_settled(world)


def test_cancel_from_either_side_after_the_end_changes_nothing() -> None:
    world = HandoverWorld()
    job = world.job()
    job.begin()
    job.reserve()
    job.make_token()
    world.run()
    job.drop_sent()
    job.drop_received()
    cancel = Cancel(*job.key)
    world.wire.to_decode.append(CancelReceived(P, "decode", cancel))
    world.wire.to_prefill.append(CancelReceived(D, "prefill", cancel))
    world.wire.to_decode.append(LastReceived(P, Last(*job.key, 1, [1])))
    world.run()
    assert_handed_over(world, job)


def test_ready_for_a_request_that_has_ended_is_answered_with_a_cancel() -> None:
    world = HandoverWorld()
    job = world.job()
    job.begin()
    job.drop_sent()
    world.wire.to_decode.clear()  # as if the channel had not been open then
    job.reserve()
    world.run()
    assert error_of(world.failed[job.key]) == ("handover_cancelled", True)
    assert_settled(world)


def test_ready_that_came_early_is_forgotten_with_its_request() -> None:
    world = HandoverWorld()
    job = world.job()
    job.reserve()
    world.wire.pass_all()
    job.drop_sent("refused")
    job.begin()
    job.make_token()
    world.run()
    assert world.sender.num_pages_sent == 0


# -- the channel breaks; nobody answers ------------------------------------------------------------------


def test_lost_channel_fails_both_sides_retryably_and_releases_nothing_twice() -> None:
    world = HandoverWorld()
    job, other = world.job("r"), world.job("not ready")
    for each in (job, other):
        each.begin()
    job.reserve()
    world.wire.pass_all()
    job.compute(8)
    world.pump()
    piece = world.wire.to_decode[0]
    assert isinstance(piece, PieceReceived)
    world.wire.lose()
    assert error_of(world.sent[job.key]) == error_of(world.failed[job.key]) == ("channel_lost", True)
    assert world.receiver.on_piece(piece) is None  # it was in the inbox already
    assert other.key not in world.sent, "nothing was promised to its peer yet: it may go over a new channel"
    world.wire.open()
    other.reserve()
    other.make_token()
    world.run()
    assert_handed_over(world, other)


def test_channel_that_breaks_while_sending_fails_that_request() -> None:
    world = HandoverWorld()
    job = world.job()
    job.begin()
    job.reserve()
    world.wire.pass_all()
    job.make_token()
    world.wire.is_open = False
    world.pump()
    assert error_of(world.sent[job.key]) == ("channel_lost", True)
    assert not world.sender.active


def test_each_side_waits_for_the_other_for_a_bounded_time() -> None:
    world = HandoverWorld()
    job = world.job()
    job.begin()
    world.pass_time(10 * TIMEOUT_S)
    assert not world.sent, "while the prompt waits or is computed, decode may take its time"
    job.make_token()
    world.pass_time(TIMEOUT_S)
    assert not world.sent
    world.pass_time(0.1)
    assert error_of(world.sent[job.key]) == ("handover_timeout", True)
    job.reserve()
    world.run()
    assert error_of(world.failed[job.key]) == ("handover_cancelled", True)
    assert_settled(world)


def test_decode_waits_for_a_channel_for_a_bounded_time() -> None:
    world = HandoverWorld(Wire(is_open=False))
    job = world.job()
    job.reserve()
    world.pass_time(TIMEOUT_S)
    assert not world.failed
    world.pass_time(0.1)
    assert error_of(world.failed[job.key]) == ("handover_timeout", True)
    assert not world.receiver.active
