"""KV that moves while steps compute: sent by groups of layers, checked when the device has got to it."""

from __future__ import annotations

import pytest

from phloem.shared.engine.step_runner import LayerWatch
from phloem.shared.protocol.session import PeerRef
from phloem.shared.transfer.events import PieceReceived
from phloem.shared.transfer.pending import DONE
from phloem.shared.transfer.stats import SendRates
from tests.support.handover_wire import D, HeldBack, Wire
from tests.support.handover_world import (
    TIMEOUT_S,
    HandoverWorld,
    Job,
    assert_handed_over,
    assert_settled,
    error_of,
)

SLOW = SendRates(1e3)  # bytes/s: a layer is a group


def ready_job(world: HandoverWorld, name: str = "r", num_tokens: int = 10) -> Job:
    job = world.job(name, num_tokens)
    job.begin()
    job.reserve()
    world.wire.pass_all()
    return job


def launch(job: Job, num_tokens: int = 10) -> LayerWatch:
    watch = job.launch(num_tokens, SLOW)
    assert watch is not None
    assert list(watch.layer_ends) == [1, 2, 3, 4]
    return watch


def layers_under_way(world: HandoverWorld) -> list[tuple[int, int]]:
    headers = [event.header for event in world.wire.to_decode if isinstance(event, PieceReceived)]
    return [(header.layer_start, header.layer_end) for header in headers]


def has_news(world: HandoverWorld) -> bool:
    return world.sender.has_news


def decode_has_news(world: HandoverWorld) -> bool:
    return world.receiver.has_news


# -- the prefill side ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("by_peer", "layer_ends"), [({D: 1e3}, [1, 2, 3, 4]), ({PeerRef("other", 1): 1e3}, [4]), ({}, [4])]
)
def test_layers_are_grouped_for_the_link_that_they_take(
    by_peer: dict[PeerRef, float], layer_ends: list[int]
) -> None:
    watch = ready_job(HandoverWorld()).launch(10, SendRates(1e12, by_peer))
    assert watch is not None and list(watch.layer_ends) == layer_ends


def test_layers_leave_when_the_device_has_written_them() -> None:
    world = HandoverWorld()
    job = ready_job(world)
    watch = launch(job)
    marks = [HeldBack() for _ in watch.layer_ends]
    for layer_end, mark in zip(watch.layer_ends, marks, strict=True):
        watch.reached(layer_end, mark)
    world.pump()
    assert (layers_under_way(world), has_news(world)) == ([], False)
    marks[0].is_done = True
    assert has_news(world)
    world.pump()
    assert (layers_under_way(world), has_news(world)) == ([(0, 1)], False)
    marks[1].is_done = marks[2].is_done = marks[3].is_done = True
    world.pump()
    assert layers_under_way(world) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    job.make_token()
    world.run()
    assert_handed_over(world, job)


def test_device_that_computes_in_our_thread_sends_layers_in_the_course_of_the_launch() -> None:
    world = HandoverWorld()
    job = ready_job(world)
    watch = launch(job)
    for layer_end in watch.layer_ends:
        watch.reached(layer_end, DONE)
        assert layers_under_way(world)[-1] == (layer_end - 1, layer_end)
    job.make_token()
    world.run()
    assert_handed_over(world, job)


def test_go_ahead_in_the_middle_of_a_step_sends_what_is_there() -> None:
    world = HandoverWorld()
    job = world.job()
    job.begin()
    watch = launch(job)
    for layer_end in watch.layer_ends[:3]:
        watch.reached(layer_end, DONE)
    job.reserve()
    world.wire.pass_all()
    world.pump()
    assert layers_under_way(world) == [(0, 1), (1, 2), (2, 3)]
    watch.reached(4, DONE)
    job.make_token()
    world.run()
    assert_handed_over(world, job)


@pytest.mark.parametrize("told", ["ready", "slot"])
def test_word_of_the_peer_while_a_step_is_launched_sends_what_the_step_before_has_written(told: str) -> None:
    world = HandoverWorld(Wire(slot_bytes=2 * 8, num_slots=1))
    job = world.job(num_tokens=12)
    job.begin()
    if told == "slot":
        job.reserve()
        world.wire.pass_all()
    launch(job, 8).all_at(DONE)
    world.pump()
    if told == "slot":
        assert layers_under_way(world) == [(0, 1)] and not has_news(world)
    watch = job.launch(12, SLOW)
    assert watch is not None
    if told == "ready":
        job.reserve()
    world.wire.pass_all()  # in the course of the launch
    mark = HeldBack()
    watch.all_at(mark)
    assert layers_under_way(world) == [(0, 1) if told == "ready" else (1, 2)]
    assert not has_news(world)
    mark.is_done = True
    job.make_token()
    world.run()
    assert_handed_over(world, job)


def test_nobody_is_asked_about_steps_without_hand_overs() -> None:
    world = HandoverWorld()
    job = world.job()
    assert job.launch(10) is None


def test_missing_slot_in_the_middle_of_a_group_goes_on_where_it_stopped() -> None:
    world = HandoverWorld(Wire(slot_bytes=8, num_slots=2))
    job = ready_job(world)
    watch = launch(job)
    watch.all_at(DONE)
    job.make_token()
    world.run()
    assert_handed_over(world, job)
    assert world.receiver.num_bytes_received == 3 * 4 * 8


@pytest.mark.parametrize("num_sent_groups", [0, 1, 3, 4])
def test_retracted_request_sends_what_had_not_gone_from_its_new_pages(num_sent_groups: int) -> None:
    world = HandoverWorld()
    job = ready_job(world)
    watch = launch(job, 8)
    marks = [HeldBack() for _ in watch.layer_ends]
    for layer_end, mark in zip(watch.layer_ends, marks, strict=True):
        mark.is_done = layer_end <= num_sent_groups
        watch.reached(layer_end, mark)
    world.pump()
    job.retract(first_page=100)
    for mark in marks:
        mark.is_done = True  # of the step before: says nothing about the new pages
    world.pump()
    world.wire.pass_all()
    assert world.receiver.num_bytes_received == 2 * num_sent_groups * 8
    again = HeldBack()
    launch(job).all_at(again)
    world.pump()
    world.wire.pass_all()
    assert world.receiver.num_bytes_received == 2 * num_sent_groups * 8, "not before it is computed again"
    again.is_done = True
    job.make_token()
    world.run()
    assert_handed_over(world, job)


def test_pages_are_fenced_before_they_are_given_back() -> None:
    world = HandoverWorld()
    job = ready_job(world)
    job.make_token()
    assert world.prefill_store.num_fences == 0
    world.run()
    assert job.key in world.sent and world.prefill_store.num_fences == 1


def test_exposed_time_is_from_the_token_to_the_word_of_admission() -> None:
    world = HandoverWorld()
    job = ready_job(world)
    job.make_token()
    world.now_s += 0.25
    world.run()
    assert_handed_over(world, job)
    assert world.sender.exposure.latest_s == [pytest.approx(0.25)]
    assert world.sender.exposure.average_s == pytest.approx(0.25)


# -- the decode side -------------------------------------------------------------------------------------


def arriving(world: HandoverWorld) -> Job:
    """Everything has come, and the device is still busy with it."""
    world.decode_store.holds_back = True
    job = ready_job(world)
    job.make_token()
    world.run()
    return job


def test_request_is_admitted_when_every_digest_was_compared() -> None:
    world = HandoverWorld()
    job = arriving(world)
    assert not world.admitted
    assert world.receiver.is_moving
    assert not decode_has_news(world)
    world.decode_store.finish()
    assert decode_has_news(world)
    world.poll()
    world.run()
    assert_handed_over(world, job)
    assert world.sender.exposure.latest_s
    assert_settled(world)


def test_damage_is_found_when_the_device_is_done() -> None:
    world = HandoverWorld()
    world.decode_store.holds_back = True
    job = ready_job(world)
    job.make_token()
    world.pump()
    piece = world.wire.to_decode[0]
    assert isinstance(piece, PieceReceived)
    piece.data[0] ^= 1
    world.run()
    assert not world.failed and not world.admitted
    world.decode_store.finish()
    world.poll()
    assert error_of(world.failed[job.key]) == ("kv_digest_mismatch", True)
    world.run()
    assert_settled(world)


@pytest.mark.parametrize("how", ["abort", "cancel"])
def test_pages_that_are_still_written_are_fenced_when_their_request_ends(how: str) -> None:
    world = HandoverWorld()
    world.decode_store.holds_back = True
    job = ready_job(world)
    job.compute(8)
    world.run()
    assert world.decode_store.num_withdrawn == 0
    if how == "abort":
        job.drop_received()
    else:
        job.drop_sent()
    world.run()
    assert world.decode_store.num_withdrawn == 1
    assert_settled(world)


def test_what_has_come_to_the_end_survives_the_loss_of_the_channel() -> None:
    world = HandoverWorld()
    job = arriving(world)
    world.wire.lose()
    world.decode_store.finish()
    world.poll()
    assert world.admitted[job.key] == [7] and job.kv_arrived


def test_prefill_side_that_sends_nothing_is_given_up() -> None:
    world = HandoverWorld()
    job = ready_job(world)
    world.pass_time(TIMEOUT_S)
    assert not world.failed
    world.pass_time(0.1)
    assert error_of(world.failed[job.key]) == ("handover_timeout", True)
    world.run()
    assert error_of(world.sent[job.key]) == ("handover_cancelled", True)
    assert_settled(world)


def test_prefill_side_that_sends_others_is_busy_not_gone() -> None:
    world = HandoverWorld()
    job, other = ready_job(world, "r"), ready_job(world, "other")
    world.pass_time(TIMEOUT_S - 1)
    other.make_token()
    world.run()
    assert other.key in world.admitted
    world.pass_time(TIMEOUT_S - 1)
    assert not world.failed
    job.make_token()
    world.run()
    assert_handed_over(world, job)


@pytest.mark.parametrize("submitted", ["before", "after"])
def test_request_that_ends_while_it_waits_for_room_is_told_to_the_prefill_side(submitted: str) -> None:
    world = HandoverWorld()
    job = world.job()
    if submitted == "before":
        job.begin()
    job.drop_received()
    world.wire.pass_all()
    if submitted == "after":
        job.begin()
    world.pump()
    assert error_of(world.sent[job.key]) == ("handover_cancelled", True)
    assert_settled(world)
