"""What the front and the peers tell the engine: aborts, refusals, deadlines, peers, cache and stop."""

from __future__ import annotations

import logging

import pytest

from phloem.shared.block_hash import BlockHasher
from phloem.shared.engine.engine_socket import FrontGone
from phloem.shared.errors import ErrorInfo
from phloem.shared.protocol.engine import (
    AbortGateway,
    DumpTree,
    EngineAbort,
    EngineSubmit,
    FlushCache,
    PeerDown,
    PeerUp,
    Reply,
    StepReport,
    Stop,
    TreeDump,
)
from phloem.shared.protocol.session import Ended, Output, PeerRef, SamplingParams, Submit
from phloem.shared.transfer.events import ChannelLost, ChannelOpened
from tests.support.engine_world import CONTEXT, EngineWorld, next_tokens
from tests.support.handover_wire import D, P, Wire


def outputs(world: EngineWorld) -> list[Output]:
    return [o for report in world.reports for group in report.outputs for o in group.outputs]


def failure(error: ErrorInfo | None) -> tuple[str, bool, int, str | None]:
    assert error is not None
    return error.code, error.retryable, error.http_status, error.param


# -- aborts ----------------------------------------------------------------------------------------------


def test_abort_ends_waiting_and_running_requests_and_leaves_the_others() -> None:
    world = EngineWorld(slots=2)
    running, other = world.submit("running", [1] * 5, 40), world.submit("other", [2] * 5, 40)
    waiting = world.submit("waiting", [3] * 5, 40)
    world.turn_until(lambda: len(running.token_ids) == 3)
    world.turn(EngineAbort("running", 1), EngineAbort("waiting", 1))
    assert (running.ended, waiting.ended) == ("aborted", "aborted")
    assert waiting.token_ids == []
    world.assert_idle()
    assert running.token_ids == next_tokens([1] * 5, 40)[: len(running.token_ids)]
    assert other.token_ids == next_tokens([2] * 5, 40)


def test_abort_of_an_unknown_ended_or_other_attempt_changes_nothing() -> None:
    world = EngineWorld()
    stream = world.submit("r", [1], 3)
    world.turn(EngineAbort("r", 2), EngineAbort("unknown", 1))
    world.assert_idle()
    assert stream.token_ids == next_tokens([1], 3)
    num_outputs = len(outputs(world))
    world.turn(EngineAbort("r", 1))
    world.run()
    assert len(outputs(world)) == num_outputs


def test_broken_session_aborts_all_requests_of_its_gateway_only() -> None:
    world = EngineWorld(slots=2)
    for index in range(6):
        world.submit(f"r{index}", [index + 1], 30, gateway=index % 2)
    world.turn()
    world.turn(AbortGateway(1))
    world.assert_idle()
    ends = [world.streams[f"r{index}"].ended for index in range(6)]
    assert ends == ["finished", "aborted"] * 3


# -- refusals and deadlines ------------------------------------------------------------------------------


def test_duplicate_is_refused_and_the_first_one_goes_on() -> None:
    world = EngineWorld()
    submit = Submit(
        request_id="r",
        attempt=1,
        epoch=1,
        phase="both",
        token_ids=[1, 2],
        num_prompt_tokens=2,
        sampling=SamplingParams(max_tokens=8),
    )
    world.streams["r"] = first = world.submit("r", [1, 2], 8)
    world.turn()
    world.engine.deliver(EngineSubmit(5, submit))
    world.engine._take_inbox(wait=False)
    refused = world.engine._outbox._outputs.pop(5)
    assert [type(output) for output in refused] == [Ended]
    assert isinstance(refused[0], Ended) and refused[0].reason == "failed"
    assert failure(refused[0].error)[0] == "duplicate_request"
    world.assert_idle()
    assert first.token_ids == next_tokens([1, 2], 8)


@pytest.mark.parametrize(
    ("prompt_length", "pages", "wanted"),
    [
        (CONTEXT, 64, ("context_length_exceeded", False, 400, "prompt")),
        (CONTEXT + 50, 64, ("context_length_exceeded", False, 400, "prompt")),
        (40, 10, ("kv_pool_too_small", False, 400, "prompt")),
    ],
)
def test_prompt_that_can_never_run_is_refused_at_once(
    prompt_length: int, pages: int, wanted: tuple[str, bool, int, str | None]
) -> None:
    world = EngineWorld(num_pages=pages)
    stream = world.submit("r", [1] * prompt_length)
    world.turn()
    assert stream.ended == "failed" and failure(stream.error) == wanted
    world.assert_idle()


def test_tokens_stop_at_the_context_length() -> None:
    world = EngineWorld()
    stream = world.submit("r", [1] * (CONTEXT - 3), 50)
    world.assert_idle()
    assert stream.token_ids == next_tokens([1] * (CONTEXT - 3), 3)
    assert stream.finish_reason == "length"


def test_phase_with_a_peer_needs_one() -> None:
    world = EngineWorld()
    for phase in ("prefill", "decode"):
        stream = world.submit(phase, [1], phase=phase)
        world.turn()
        assert failure(stream.error)[0] == "bad_submit"
    world.assert_idle()


def test_full_queue_is_refused_retryably() -> None:
    world = EngineWorld(slots=1, max_queued=2)
    streams = [world.submit(f"r{index}", [1], 5) for index in range(3)]
    world.turn()
    assert failure(streams[2].error)[:3] == ("queue_full", True, 503)
    world.assert_idle()
    assert [stream.ended for stream in streams] == ["finished", "finished", "failed"]


def test_request_past_its_deadline_fails_wherever_it_is() -> None:
    world = EngineWorld(Wire().decode, slots=2)
    running = world.submit("running", [1], 100, timeout_s=5.0)
    receiving = world.submit("receiving", [2], 100, phase="decode", peer=P, timeout_s=5.0)
    waiting = world.submit("waiting", [3], 100, timeout_s=5.0)
    patient = world.submit("patient", [4], 10, timeout_s=500.0)
    world.turn_until(lambda: len(running.token_ids) == 2)
    world.now_s += 4.0
    world.turn()
    assert not any(stream.ended for stream in world.streams.values())
    world.now_s += 1.5
    world.turn()
    for stream in (running, receiving, waiting):
        assert failure(stream.error) == ("deadline_exceeded", False, 504, None)
    world.assert_idle()
    assert patient.token_ids == next_tokens([4], 10)


# -- the cache and the index -----------------------------------------------------------------------------


def test_flush_forgets_what_no_request_holds() -> None:
    world = EngineWorld()
    world.submit("done", [1] * 12, 2)
    world.run()
    running = world.submit("running", [2] * 12, 30)
    world.turn_until(lambda: running.token_ids)
    world.turn(FlushCache(9))
    assert Reply(9) in world.said
    reply = world.audit()
    assert 0 < reply.tree_pages <= 12 and reply.locked_nodes > 0
    again = world.submit("again", [1] * 12, 2)
    world.assert_idle()
    assert again.num_cached_tokens == 0
    world.turn(FlushCache(10))
    assert world.audit().tree_pages == 0


def test_dump_holds_exactly_what_the_reports_before_it_have_announced() -> None:
    world = EngineWorld(num_pages=40, budget=200)
    hasher = BlockHasher(b"test")
    for index in range(6):
        world.submit(f"r{index}", [index + 1] * 70, 10)
        world.turn(DumpTree(index))
        world.run()
    world.assert_idle()
    world.turn(DumpTree(6))
    held: set[bytes] = set()
    dumps = 0
    for message in world.said:
        if isinstance(message, StepReport):
            assert held.isdisjoint(message.stored) and held.issuperset(message.removed)
            held = (held - set(message.removed)) | set(message.stored)
        elif isinstance(message, TreeDump):
            assert set(message.block_hashes) == held
            dumps += 1
    assert dumps == 7
    assert hasher.chain([6] * 64)[0] in held, "the newest prompt"
    assert hasher.chain([1] * 64)[0] not in held, "evicted"


# -- peers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dials_peers", [True, False])
def test_only_engines_that_send_kv_dial_their_peers(dials_peers: bool) -> None:
    wire = Wire()
    world = EngineWorld(wire.prefill, dials_peers=dials_peers)
    world.turn(PeerUp(D, "127.0.0.1:1234"))
    assert wire.prefill.peers_up == ([(D, "127.0.0.1:1234")] if dials_peers else [])


@pytest.mark.parametrize("is_open", [True, False])
def test_peer_that_is_gone_fails_the_requests_that_need_it(is_open: bool) -> None:
    wire = Wire(is_open=is_open)
    world = EngineWorld(wire.prefill)
    wire.deliver_to_prefill, wire.deliver_to_decode = world.engine.deliver, lambda event: None
    lost = [
        world.submit("sending", [1] * 5, phase="prefill", peer=D),
        world.submit("prefilling", [1] * 150, phase="prefill", peer=D),
    ]
    to_another = world.submit("to another", [1] * 5, phase="prefill", peer=PeerRef("other", 1))
    local = world.submit("local", [2] * 5)
    world.turn_until(lambda: lost[0].token_ids and local.token_ids)
    world.turn(PeerDown(PeerRef(D.worker_id, D.epoch + 1)))
    assert not any(stream.ended for stream in lost)
    world.turn(PeerDown(D))
    assert wire.prefill.peers_down[-1] == D
    world.run()
    for stream in lost:
        assert stream.ended == "failed" and failure(stream.error) == ("peer_gone", True, 503, None)
    assert (local.ended, to_another.ended) == ("finished", None)
    world.turn(EngineAbort("to another", 1))
    world.assert_idle()


def test_peer_that_is_gone_fails_what_waits_for_its_kv() -> None:
    wire = Wire()
    world = EngineWorld(wire.decode, slots=2)
    wire.deliver_to_prefill, wire.deliver_to_decode = (lambda event: None), world.engine.deliver
    streams = [world.submit(f"r{index}", [index] * 5, phase="decode", peer=P) for index in range(3)]
    world.run()  # two are receiving, one is waiting
    world.turn(PeerDown(P))
    world.assert_idle()
    assert [failure(stream.error)[0] for stream in streams] == ["peer_gone"] * 3


# -- the end ---------------------------------------------------------------------------------------------


def test_stop_ends_every_request_and_the_loop() -> None:
    world = EngineWorld(Wire().decode, slots=2)
    world.submit("running", [1] * 5, 100)
    world.submit("receiving", [2] * 5, 100, phase="decode", peer=P)
    world.submit("waiting", [3] * 5, 100)
    world.turn_until(lambda: world.streams["running"].token_ids)
    world.engine.deliver(Stop())
    world.engine.run()
    assert [stream.ended for stream in world.streams.values()] == ["aborted"] * 3
    assert world.device.num_launched == world.device.num_collected
    account = world.engine._account
    assert account.audit([]) == [] and account.tree.num_locked_pages == 0


def test_loop_ends_when_its_front_is_gone() -> None:
    world = EngineWorld()
    world.submit("r", [1], 100)
    world.engine.deliver(FrontGone("closed"))
    world.engine.run()
    assert world.device.num_launched == 0


def test_log_tells_when_a_channel_opens_and_when_it_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    world = EngineWorld()
    world.engine.deliver(ChannelOpened(D, "prefill"))
    world.engine.deliver(ChannelLost(D, "prefill", ErrorInfo("channel_lost", "it closed")))
    world.turn()
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", f"KV channel with {D.worker_id} (as prefill) is open"),
        ("WARNING", f"KV channel with {D.worker_id} (as prefill) is lost: it closed"),
    ]
