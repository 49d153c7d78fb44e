"""Two engine loops joined by a wire in memory: exact tokens across a hand-over, and clean ends."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phloem.shared.errors import ErrorInfo
from phloem.shared.protocol.engine import AbortGateway, EngineAbort
from phloem.shared.protocol.session import TokensOut
from phloem.shared.transfer.events import PieceReceived
from phloem.shared.transfer.pending import Moved, MovedNow
from phloem.shared.transfer.stats import TransferStatus
from tests.support.engine_pair import PAGE, Pair, Sides, assert_tokens
from tests.support.engine_world import HANDOVER_TIMEOUT_S, next_tokens
from tests.support.handover_wire import D, Wire


@pytest.mark.parametrize("runs_ahead", [True, False])
def test_tokens_are_exact_across_the_hand_over(runs_ahead: bool) -> None:
    pair = Pair(runs_ahead=runs_ahead)
    prompts = [[index + 1] * (7 * index + 1) for index in range(6)]
    all_sides = [pair.submit(f"r{index}", prompt, 12) for index, prompt in enumerate(prompts)]
    pair.assert_idle()
    for sides, prompt in zip(all_sides, prompts, strict=True):
        assert len(sides.prefill.token_ids) == 1
        assert_tokens(sides, prompt, 12)


def test_pages_travel_while_later_chunks_are_computed() -> None:
    pair = Pair(Wire(slot_bytes=8 * PAGE, num_slots=30))
    prompt = list(range(1, 100))  # 4 chunks of at most 32 tokens
    sides = pair.submit("r", prompt)
    while not sides.prefill.token_ids:
        pair.step()
    assert pair.decode.audit().counters["pages_received"] >= 24
    pair.assert_idle()
    assert_tokens(sides, prompt, 8)


def test_both_workers_report_their_timeline_with_their_first_token() -> None:
    pair = Pair()
    pair.submit("r", [1] * 9)
    pair.assert_idle()
    for world, count in ((pair.prefill, 1), (pair.decode, 7)):
        tokens = [o for r in world.reports for g in r.outputs for o in g.outputs if isinstance(o, TokensOut)]
        assert [sorted(o.timeline) for o in tokens] == [["first_token", "queued"]] + [[]] * (count - 1)


def test_idle_engine_wakes_up_for_kv_that_has_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    """No message tells it."""
    pair = Pair(Wire(slot_bytes=64 * PAGE, num_slots=8))
    scatter, arriving = pair.decode.device.scatter, list[_Late]()

    def late(*args: Any, **options: Any) -> Moved:
        arriving.append(_Late(scatter(*args, **options).digest()))
        return arriving[-1]

    monkeypatch.setattr(pair.decode.device, "scatter", late)
    sides = pair.submit("r", [3] * 9)
    while not (sides.prefill.ended and arriving and pair.decode.engine._receiver.is_moving):
        pair.step()
    while pair.decode.turn():
        pass
    assert not sides.decode.token_ids and arriving[-1].looks_left
    pair.decode.engine.turn(wait=True)
    assert not any(moved.looks_left for moved in arriving), "it waited for the device"
    pair.assert_idle()
    assert_tokens(sides, [3] * 9, 8)


def test_idle_prefill_engine_stays_awake_for_the_go_ahead_of_what_it_has_just_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = Pair()
    stream, waits = pair.submit_prefill("r", [3] * 9), list[float]()
    while not stream.token_ids:
        pair.prefill.turn()
    while pair.prefill.turn():
        pass
    inbox = pair.prefill.engine._inbox

    def noted(wait_s: float = 0.0) -> AbortGateway | None:
        if not wait_s:
            return None
        waits.append(wait_s)
        return AbortGateway(99)  # of no request's

    for late_s in (0.0, 0.01):
        pair.prefill.now_s += late_s
        with monkeypatch.context() as patch:
            patch.setattr(inbox, "next", noted)
            pair.prefill.engine.turn(wait=True)
    assert len(waits) == 2 and waits[0] < 0.001 < 0.01 < waits[1]


class _Late(MovedNow):
    """Over when somebody has asked a thousand times."""

    def __init__(self, digest: int) -> None:
        super().__init__(digest)
        self.looks_left = 1000

    def done(self) -> bool:
        self.looks_left = max(0, self.looks_left - 1)
        return not self.looks_left


def test_decode_is_sent_only_what_it_lacks() -> None:
    pair = Pair()
    first = pair.submit("first", [5] * 18, 6)
    pair.assert_idle()
    assert pair.prefill.audit().counters["pages_sent"] == 5
    prompt = [5] * 18 + first.prefill.token_ids + first.decode.token_ids + [9] * 10
    second = pair.submit("second", prompt)
    pair.assert_idle()
    assert_tokens(second, prompt, 8)
    # It holds 18 + 5 computed tokens, 5 full pages, of 34 tokens that are 9 pages.
    assert pair.prefill.audit().counters["pages_sent"] == 5 + 4
    assert second.prefill.num_cached_tokens == 16


def test_request_that_waits_for_room_at_decode_keeps_its_pages_at_prefill() -> None:
    pair = Pair(decode_slots=1)
    first, second = pair.submit("first", [1] * 9, 30), pair.submit("second", [2] * 9, 5)
    while len(first.decode.token_ids) < 10:
        pair.step()
    assert second.prefill.token_ids == next_tokens([2] * 9, 1), "token 0 does not wait for decode"
    assert second.prefill.ended is None
    assert pair.prefill.audit().num_requests == 1
    pair.assert_idle()
    assert_tokens(first, [1] * 9, 30)
    assert_tokens(second, [2] * 9, 5)


def test_request_retracted_at_decode_is_computed_again_there() -> None:
    pair = Pair(decode_pages=20)
    jobs = {f"r{index}": [index + 1] * 12 for index in range(3)}
    all_sides = [pair.submit(request_id, prompt, 40) for request_id, prompt in jobs.items()]
    pair.assert_idle()
    assert pair.decode.audit().counters["retractions"] > 0
    for sides, prompt in zip(all_sides, jobs.values(), strict=True):
        assert_tokens(sides, prompt, 40)


# -- early ends ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("why", ["max_tokens", "stop"])
def test_request_that_ends_with_token_0_is_not_handed_over(why: str) -> None:
    pair = Pair()
    (token,) = next_tokens([3] * 6, 1)
    sides = pair.submit("r", [3] * 6, 1 if why == "max_tokens" else 9, (token,) if why == "stop" else ())
    pair.assert_idle()
    assert sides.prefill.token_ids == [token] and sides.prefill.ended == "finished"
    assert sides.prefill.finish_reason == ("stop" if why == "stop" else "length")
    assert sides.decode.ended == "failed" and sides.codes == [None, "handover_cancelled"]


def test_abort_of_a_request_that_waits_for_room_is_told_to_prefill() -> None:
    pair = Pair(decode_slots=1)
    first, second = pair.submit("first", [1] * 9, 30), pair.submit("second", [2] * 9, 5)
    while not (first.decode.token_ids and second.prefill.token_ids):
        pair.step()
    pair.decode.turn(EngineAbort("second", 1))
    pair.assert_idle()
    assert second.decode.ended == "aborted"
    assert second.prefill.ended == "failed" and second.codes == ["handover_cancelled", None]
    assert_tokens(first, [1] * 9, 30)


def test_prefill_knows_how_long_each_transfer_was_exposed() -> None:
    pair = Pair()
    for index in range(3):
        pair.submit(f"r{index}", [index + 1] * 9)
    pair.assert_idle()
    exposed_s = pair.prefill.audit().exposed_transfer_s
    assert len(exposed_s) == 3 and all(seconds >= 0.0 for seconds in exposed_s)
    assert pair.decode.audit().exposed_transfer_s == []


def test_abort_of_a_receiving_request_is_told_to_prefill() -> None:
    pair = Pair()
    sides = pair.submit("r", [1] * 100)
    while not pair.decode.audit().counters["pages_received"]:
        pair.step()
    pair.decode.turn(EngineAbort("r", 1))
    pair.assert_idle()
    assert sides.decode.ended == "aborted"
    assert sides.prefill.ended == "failed" and sides.codes == ["handover_cancelled", None]


def test_abort_of_a_sending_request_is_told_to_decode() -> None:
    pair = Pair(decode_slots=1)
    pair.submit("first", [9], 20)
    sides = pair.submit("r", [1] * 10)
    while not sides.prefill.token_ids:
        pair.step()
    pair.prefill.turn(EngineAbort("r", 1))
    pair.assert_idle()
    assert sides.prefill.ended == "aborted"
    assert sides.decode.ended == "failed" and sides.codes == [None, "handover_cancelled"]


def test_client_that_leaves_is_aborted_on_both_sides() -> None:
    pair = Pair()
    sides = [pair.submit(f"r{index}", [index] * 40) for index in range(4)]
    pair.step()
    pair.prefill.turn(AbortGateway(0))
    pair.decode.turn(AbortGateway(0))
    pair.assert_idle()
    assert {stream.ended for both in sides for stream in both} == {"aborted"}


def test_lost_channel_fails_both_sides_and_the_next_request_works() -> None:
    pair = Pair()
    sides = pair.submit("r", [1] * 100)
    while not pair.decode.audit().counters["pages_received"]:
        pair.step()
    pair.wire.lose()
    pair.run()
    assert sides.codes == ["channel_lost", "channel_lost"]
    again = pair.submit("again", [1] * 100)
    pair.run()
    assert again.decode.ended is None, "it waits for the channel"
    pair.wire.open()
    pair.assert_idle()
    assert_tokens(again, [1] * 100, 8)


def test_damaged_kv_is_never_decoded_nor_cached() -> None:
    pair = Pair()
    sides = pair.submit("r", [1] * 20)
    while not pair.wire.to_decode:
        pair.prefill.turn()
        pair.decode.turn()
        while pair.wire.to_prefill:
            pair.wire.pass_to_prefill()
    piece = pair.wire.to_decode[0]
    assert isinstance(piece, PieceReceived)
    piece.data[0] ^= 1
    pair.run()
    assert sides.decode.ended == "failed" and sides.codes[1] == "kv_digest_mismatch"
    assert sides.decode.token_ids == []
    assert pair.decode.audit().tree_pages == 0
    again = pair.submit("again", [1] * 20)
    pair.assert_idle()
    assert_tokens(again, [1] * 20, 8)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_interleaving_ends_every_request_on_both_sides(data: st.DataObject) -> None:
    pair = Pair(
        Wire(slot_bytes=data.draw(st.sampled_from([8 * PAGE, 100])), num_slots=data.draw(st.integers(1, 3))),
        prefill_pages=data.draw(st.integers(30, 60)),
        decode_pages=data.draw(st.integers(30, 60)),
        decode_slots=data.draw(st.integers(1, 4)),
        runs_ahead=data.draw(st.booleans()),
    )
    rng = random.Random(data.draw(st.integers(0, 10_000)))
    jobs: dict[str, tuple[list[int], Sides]] = {}
    disturbed = rng.random() < 0.7
    for index in range(6):
        prompt = [rng.randint(1, 2)] * rng.randint(1, 60)
        jobs[f"r{index}"] = prompt, pair.submit(f"r{index}", prompt, 12)
        for _ in range(rng.randint(0, 30)):
            _random_move(pair, rng, disturbed, index)
    if not pair.wire.is_open:
        pair.wire.open()
    pair.run()
    for _ in range(2):
        for world in (pair.prefill, pair.decode):
            world.now_s += HANDOVER_TIMEOUT_S + 1
        pair.run()
    pair.assert_idle()
    for prompt, sides in jobs.values():
        tokens = sides.prefill.token_ids + sides.decode.token_ids
        assert tokens == next_tokens(prompt, 12)[: len(tokens)]
        assert sides.handed_over == (len(tokens) == 12)
        assert sides.handed_over or disturbed


def _random_move(pair: Pair, rng: random.Random, disturbed: bool, newest: int) -> None:
    match rng.randint(0, 5):
        case 0 | 1:
            rng.choice([pair.prefill, pair.decode]).audit()
        case 2 | 3 if pair.wire.to_decode:
            pair.wire.pass_to_decode()
        case 4 if pair.wire.to_prefill:
            pair.wire.pass_to_prefill()
        case 5 if disturbed and rng.random() < 0.3:
            _disturb(pair, rng, newest)


def _disturb(pair: Pair, rng: random.Random, newest: int) -> None:
    if rng.random() < 0.5:
        victim = EngineAbort(f"r{rng.randint(0, newest)}", 1)
        rng.choice([pair.prefill, pair.decode]).turn(victim)
    elif pair.wire.is_open:
        pair.wire.lose()
    else:
        pair.wire.open()


def test_steps_beside_hand_overs_begin_after_the_reads_of_pages_they_may_be_given() -> None:
    pair = Pair()
    sides = pair.submit("r", [1] * 100)
    pair.assert_idle()
    assert sides.handed_over
    assert pair.prefill.device.num_fences >= pair.prefill.device.num_launched
    assert pair.decode.device.num_fences == 0, "a decode step waits for no other request's pages"


def test_requests_for_a_peer_that_is_cut_off_fail_at_once_and_others_go_on() -> None:
    pair = Pair(Wire(is_open=False))
    in_vain = pair.submit_prefill("in vain", [1] * 9)
    both = pair.prefill.submit("both", [2] * 9, 3, phase="both")
    pair.prefill.transfer = TransferStatus(
        cut_off={D.worker_id: ErrorInfo("staging_full", "no memory", True)}
    )
    pair.prefill.now_s += 1.0
    pair.assert_idle()
    assert in_vain.error is not None
    assert (in_vain.error.code, in_vain.error.retryable) == ("channel_refused", True)
    assert in_vain.error.message == f"no KV channel with {D.worker_id}: no memory"
    assert (both.ended, both.token_ids) == ("finished", next_tokens([2] * 9, 3))
    assert pair.prefill.reports[-1].load is not None
    assert any(report.load and report.load.cut_off == (D.worker_id,) for report in pair.prefill.reports)
