"""One request's state machine, without a network."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phloem.services.gateway.cluster.request import RequestState
from phloem.shared.errors import ErrorInfo
from tests.support.request_state import LOST, D, P, U, ended, new_state, pair_state, tokens, waits


def test_submissions_name_phase_peer_and_what_is_left() -> None:
    submits = new_state().begin({D: "decode", P: "prefill"}, [b"h"], 2.5)
    assert list(submits) == [D, P]
    assert (submits[D].phase, submits[D].peer, submits[P].phase, submits[P].peer) == (
        "decode",
        P,
        "prefill",
        D,
    )
    for submit in submits.values():
        assert (submit.request_id, submit.attempt, submit.epoch) == ("r", 1, 1)
        assert (submit.token_ids, submit.num_prompt_tokens) == ([1, 2, 3], 3)
        assert (submit.block_hashes, submit.cache_salt, submit.timeout_s) == ([b"h"], "salt", 7.5)


def test_tokens_of_both_workers_are_emitted_in_order() -> None:
    state = pair_state()
    state.on_tokens(D, tokens(1, 2))
    assert state.take() is None
    state.on_tokens(P, tokens(0))
    item = state.take()
    assert item is not None and item.token_ids == [100, 101, 102]
    state.on_tokens(D, tokens(3, 1, "length"))
    item = state.take()
    assert item is not None and (item.token_ids, item.finish_reason) == ([103], "length")
    assert state.finished


def test_token_that_came_twice_is_emitted_once() -> None:
    state = pair_state()
    state.on_tokens(P, tokens(0))
    state.on_tokens(D, tokens(0, 3))
    item = state.take()
    assert item is not None and item.token_ids == [100, 101, 102]


def test_terminal_token_0_finishes_without_decode() -> None:
    state = pair_state()
    state.on_tokens(P, tokens(0, 1, "stop"))
    assert state.finished and state.open_workers == [D, P]
    item = state.take()
    assert item is not None and item.finish_reason == "stop"


def test_outputs_of_an_old_attempt_are_dropped() -> None:
    state = pair_state()
    state.on_lost(D, LOST)
    state.begin({U: "both"}, [], 0.0)
    state.on_tokens(P, tokens(0))
    state.on_tokens(U, tokens(0, attempt=1))
    assert state.take() is None
    state.on_ended(U, ended("failed", LOST, attempt=1))
    assert state.failure is None


def test_resumed_attempt_submits_prompt_and_emitted_tokens() -> None:
    state = pair_state()
    state.on_tokens(P, tokens(0))
    state.on_tokens(D, tokens(1))
    state.on_lost(D, LOST)
    assert state.failure is not None and state.failure.avoid == D
    submit = state.begin({U: "both"}, [], 0.0)[U]
    assert (submit.attempt, submit.token_ids, submit.num_prompt_tokens) == (2, [1, 2, 3, 100, 101], 3)
    state.on_tokens(U, tokens(2, 2, "length", attempt=2))
    item = state.take()
    assert item is not None and item.token_ids == [100, 101, 102, 103] and state.finished


def test_lost_prefill_worker_before_token_0_fails_the_attempt() -> None:
    state = pair_state()
    state.on_tokens(D, tokens(1))  # it knows token 0, but only prefill sends it
    state.on_lost(P, LOST)
    assert state.failure is not None and state.failure.avoid == P


def test_lost_prefill_worker_after_token_0_gives_decode_a_chance() -> None:
    state = pair_state()
    state.on_tokens(P, tokens(0))
    state.on_lost(P, LOST)
    assert waits(state)
    state.on_tokens(D, tokens(1))
    assert not waits(state) and not state.decided


def test_decode_that_stays_silent_in_grace_fails_the_attempt() -> None:
    state = pair_state()
    state.on_tokens(P, tokens(0))
    state.on_lost(P, LOST)
    state.on_grace_over()
    assert state.failure is not None
    assert (state.failure.error.code, state.failure.avoid) == ("handover_lost", P)


def test_prefill_worker_lost_after_it_handed_over_does_not_matter() -> None:
    state = pair_state()
    state.on_tokens(P, tokens(0))
    state.on_ended(P, ended("handed_over"))
    state.on_lost(P, LOST)
    assert not state.decided and not state.in_grace


def test_decode_that_finishes_first_waits_for_token_0() -> None:
    state = pair_state()
    state.on_tokens(D, tokens(1, 3, "length"))
    state.on_ended(D, ended("finished"))
    assert not state.decided and state.in_grace
    state.on_tokens(P, tokens(0))
    assert state.finished


def test_failure_of_the_peer_blames_the_peer() -> None:
    state = pair_state()
    state.on_ended(D, ended("failed", ErrorInfo("channel_lost", "no channel", retryable=True)))
    assert state.failure is not None and state.failure.avoid == P


def test_own_failure_blames_the_worker_itself() -> None:
    state = pair_state()
    state.on_ended(D, ended("failed", ErrorInfo("queue_full", "full", retryable=True)))
    assert state.failure is not None and state.failure.avoid == D


def test_cancellation_by_the_peer_waits_for_the_peers_own_reason() -> None:
    state = pair_state()
    state.on_ended(P, ended("failed", ErrorInfo("handover_cancelled", "decode gave up", retryable=True)))
    assert waits(state)
    state.on_ended(D, ended("failed", ErrorInfo("context_too_long", "too long", http_status=400)))
    assert state.failure is not None and state.failure.error.code == "context_too_long"


def test_cancellation_without_a_reason_fails_in_the_end() -> None:
    state = pair_state()
    state.on_ended(P, ended("failed", ErrorInfo("handover_cancelled", "decode gave up", retryable=True)))
    state.on_grace_over()
    assert state.failure is not None
    assert (state.failure.error.code, state.failure.avoid) == ("handover_cancelled", D)


def test_prefill_failure_after_decode_began_does_not_matter() -> None:
    state = pair_state()
    state.on_tokens(P, tokens(0))
    state.on_tokens(D, tokens(1))
    state.on_ended(P, ended("failed", LOST))
    assert not state.decided


def test_worker_that_aborts_by_itself_fails_the_attempt_retryably() -> None:
    state = new_state()
    state.begin({U: "both"}, [], 0.0)
    state.on_ended(U, ended("aborted"))
    assert state.failure is not None and state.failure.error.retryable


def test_workers_that_all_end_without_the_last_token_fail_the_attempt() -> None:
    state = pair_state()
    state.on_tokens(P, tokens(0))
    state.on_ended(P, ended("handed_over"))
    state.on_ended(D, ended("finished"))
    assert state.failure is not None and state.failure.error.code == "handover_lost"


def test_cached_tokens_and_timeline_are_those_of_the_first_attempt() -> None:
    state = new_state()
    state.begin({U: "both"}, [], 1.0)
    state.on_tokens(U, tokens(0, cached=2))
    item = state.take()
    assert item is not None
    assert (item.num_cached_tokens, item.timeline) == (2, {"both.first_token": 1.5})
    state.on_lost(U, LOST)
    state.begin({P: "both"}, [], 5.0)
    state.on_tokens(P, tokens(1, attempt=2, cached=4))
    item = state.take()
    assert item is not None and (item.num_cached_tokens, item.timeline) == (2, {})


@given(st.data())
def test_any_arrival_order_gives_every_token_once(data: st.DataObject) -> None:
    """Each worker is in order, but they interleave anyhow; messages hold any number of tokens, some twice."""
    total = data.draw(st.integers(2, 12))
    state = pair_state(total)
    cuts = sorted(data.draw(st.sets(st.integers(2, total - 1), max_size=total)) if total > 2 else set())
    bounds = list(zip([1, *cuts], [*cuts, total], strict=True))
    from_d = [tokens(a, b - a, "length" if b == total else None) for a, b in bounds]
    repeated = data.draw(st.lists(st.sampled_from(from_d[:-1]), max_size=3)) if from_d[:-1] else []
    queues = {P: [tokens(0)], D: sorted([*from_d, *repeated], key=lambda t: t.start)}
    emitted: list[int] = []
    while any(queues.values()):
        worker = data.draw(st.sampled_from([w for w, queue in queues.items() if queue]))
        state.on_tokens(worker, queues[worker].pop(0))
        item = state.take()
        emitted += item.token_ids if item is not None else []
    assert emitted == [100 + index for index in range(total)]
    assert state.finished


events = st.sampled_from(
    [
        "p_token",
        "d_token",
        "d_last",
        "p_handed",
        "d_finished",
        "p_failed",
        "d_failed",
        "p_lost",
        "d_lost",
        "grace",
    ]
)


@given(st.lists(events, max_size=12))
@pytest.mark.parametrize("end", ["lost", "grace"])
def test_request_always_reaches_a_decision(end: str, sequence: list[str]) -> None:
    """Whatever the workers say, once both are gone the attempt is decided, and a decision stays."""
    state = pair_state(3)
    for event in sequence:
        before = state.decided, state.failure
        _apply(state, event)
        if before[0]:
            assert (state.decided, state.failure) == before
    if end == "lost":
        state.on_lost(P, LOST)
        state.on_lost(D, LOST)
        assert state.decided
    elif state.in_grace:
        state.on_grace_over()
        assert state.decided


def _apply(state: RequestState, event: str) -> None:
    match event:
        case "p_token":
            state.on_tokens(P, tokens(0))
        case "d_token":
            state.on_tokens(D, tokens(1))
        case "d_last":
            state.on_tokens(D, tokens(2, 1, "length"))
        case "p_handed":
            state.on_ended(P, ended("handed_over"))
        case "d_finished":
            state.on_ended(D, ended("finished"))
        case "p_failed":
            state.on_ended(P, ended("failed", LOST))
        case "d_failed":
            state.on_ended(D, ended("failed", LOST))
        case "p_lost":
            state.on_lost(P, LOST)
        case "d_lost":
            state.on_lost(D, LOST)
        case "grace":
            state.on_grace_over()
