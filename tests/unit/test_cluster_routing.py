"""Routing: pure functions of a snapshot."""

from __future__ import annotations

import math
from collections import Counter
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phloem.services.gateway.cluster.routing import (
    Candidate,
    Decision,
    RoutingPolicy,
    RoutingRequest,
    route,
)
from phloem.shared.protocol.cluster import Role, WorkerLoad
from tests.support.routing import request, worker

POLICIES = get_args(RoutingPolicy)


def decide(policy: RoutingPolicy, wanted: RoutingRequest, *candidates: Candidate) -> Decision:
    decision = route(policy, wanted, candidates)
    assert decision is not None
    return decision


def names(decision: Decision) -> tuple[str | None, str]:
    return decision.prefill.worker_id if decision.prefill else None, decision.decode.worker_id


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_that_decodes_means_no_decision(policy: RoutingPolicy) -> None:
    assert route(policy, request(), []) is None
    assert route(policy, request(), [worker("p", "prefill")]) is None


@pytest.mark.parametrize("policy", POLICIES)
def test_long_prompt_goes_through_a_pair(policy: RoutingPolicy) -> None:
    assert names(decide(policy, request(), worker("p", "prefill"), worker("d", "decode"))) == ("p", "d")


@pytest.mark.parametrize("policy", POLICIES)
def test_decode_worker_alone_does_both_phases(policy: RoutingPolicy) -> None:
    assert names(decide(policy, request(), worker("d", "decode"))) == (None, "d")


@pytest.mark.parametrize("policy", POLICIES)
def test_workers_of_different_layouts_never_pair(policy: RoutingPolicy) -> None:
    decision = decide(policy, request(), worker("p", "prefill", layout="other"), worker("d", "decode"))
    assert names(decision) == (None, "d")


@pytest.mark.parametrize("policy", POLICIES)
def test_unified_workers_do_both_phases_alone(policy: RoutingPolicy) -> None:
    decision = decide(policy, request(), worker("u1", "unified"), worker("u2", "unified"))
    assert decision.prefill is None


def test_short_rest_is_prefilled_where_it_is_decoded() -> None:
    decision = decide(
        "cost", request(1000), worker("p", "prefill", cached=900), worker("d", "decode", cached=998)
    )
    assert names(decision) == (None, "d")


def test_local_prefill_wins_when_the_prefill_workers_queue_is_long() -> None:
    busy = WorkerLoad(queued_tokens=100_000, prefill_tokens_per_s=1000)
    assert names(decide("cost", request(), worker("p", "prefill", busy), worker("d", "decode"))) == (
        None,
        "d",
    )


def test_local_prefill_costs_more_the_more_it_holds_up() -> None:
    busy = WorkerLoad(num_running=5, free_pages=1000, total_pages=1000, prefill_tokens_per_s=1000)
    queue = WorkerLoad(queued_tokens=3000, prefill_tokens_per_s=1000)
    p = worker("p", "prefill", queue)
    assert names(decide("cost", request(), p, worker("d", "decode"))) == (None, "d")
    assert names(decide("cost", request(), p, worker("d", "decode", busy))) == ("p", "d")


def test_prefill_goes_to_the_worker_that_holds_the_prefix() -> None:
    decision = decide(
        "cost",
        request(),
        worker("p1", "prefill"),
        worker("p2", "prefill", cached=500),
        worker("d", "decode"),
    )
    assert names(decision) == ("p2", "d")


def test_held_prefix_is_not_worth_a_longer_queue() -> None:
    queue = WorkerLoad(queued_tokens=2000, prefill_tokens_per_s=1000)
    decision = decide(
        "cost",
        request(),
        worker("p1", "prefill"),
        worker("p2", "prefill", queue, cached=500),
        worker("d", "decode"),
    )
    assert names(decision) == ("p1", "d")


def test_own_submissions_count_before_a_heartbeat_knows_them() -> None:
    decision = decide(
        "cost",
        request(),
        worker("p1", "prefill", own_prefill_tokens=5000),
        worker("p2", "prefill"),
        worker("d1", "decode", own_requests=6),
        worker("d2", "decode"),
    )
    assert names(decision) == ("p2", "d2")


def test_decode_avoids_a_worker_without_pages() -> None:
    full = WorkerLoad(free_pages=1, total_pages=1000, prefill_tokens_per_s=1000)
    decision = decide(
        "cost",
        request(),
        worker("p", "prefill"),
        worker("d1", "decode", full),
        worker("d2", "decode"),
    )
    assert names(decision) == ("p", "d2")


def test_unmeasured_worker_is_taken_for_the_average_one() -> None:
    slow = WorkerLoad(free_pages=1000, total_pages=1000, prefill_tokens_per_s=100)
    new = WorkerLoad(free_pages=1000, total_pages=1000)
    decision = decide("cost", request(), worker("p", "prefill", slow), worker("d", "decode", new))
    assert names(decision) == ("p", "d")


def test_decision_tells_the_terms_of_its_cost() -> None:
    decision = decide("cost", request(), worker("p", "prefill"), worker("d", "decode"))
    assert {"prefill_queue", "prefill", "handover", "transfer", "decode"} <= set(decision.terms)
    assert decision.terms["prefill"] == pytest.approx(1.0)
    assert decision.terms["transfer"] == pytest.approx(0.05)
    assert decision.cost_s == pytest.approx(sum(decision.terms.values()))
    assert decision.num_options == 2


def test_equal_options_are_shared_out_and_the_same_for_one_request() -> None:
    workers = [worker(f"p{n}", "prefill") for n in range(2)] + [worker(f"d{n}", "decode") for n in range(2)]
    chosen = [names(decide("cost", request(request_id=str(n)), *workers)) for n in range(200)]
    assert chosen == [names(decide("cost", request(request_id=str(n)), *workers[::-1])) for n in range(200)]
    counts = Counter(chosen)
    assert len(counts) == 4 and min(counts.values()) > 20


def test_round_robin_takes_turns() -> None:
    workers = [worker(f"p{n}", "prefill") for n in range(2)] + [worker(f"d{n}", "decode") for n in range(3)]
    chosen = [names(decide("round_robin", request(sequence=n), *workers)) for n in range(24)]
    assert set(Counter(chosen).values()) == {4}
    assert all(p is not None for p, _ in chosen)


def test_least_loaded_counts_requests() -> None:
    busy = WorkerLoad(num_running=3, num_waiting=2)
    workers = [worker("p", "prefill"), worker("d1", "decode", busy), worker("d2", "decode")]
    assert names(decide("least_loaded", request(), *workers)) == ("p", "d2")


loads = st.builds(
    WorkerLoad,
    num_running=st.integers(0, 100),
    num_waiting=st.integers(0, 100),
    queued_tokens=st.integers(0, 10**6),
    free_pages=st.integers(0, 1000),
    total_pages=st.sampled_from([0, 1000]),
    prefill_tokens_per_s=st.floats(0, 1e6),
    decode_step_s=st.floats(0, 10),
    transfer_bytes_per_s=st.floats(0, 1e12),
    cut_off=st.sampled_from([(), (), ("1",), ("0", "2"), tuple("012345")]),
)
roles = st.sampled_from(get_args(Role))


@settings(deadline=None)
@given(
    st.sampled_from(POLICIES),
    st.lists(st.tuples(roles, loads, st.integers(0, 5000)), max_size=6),
    st.integers(1, 5000),
    st.integers(0, 1000),
)
def test_any_cluster_with_a_decoder_gets_a_sound_decision(
    policy: RoutingPolicy, described: list[tuple[Role, WorkerLoad, int]], num_tokens: int, sequence: int
) -> None:
    candidates = [
        worker(str(n), role, load, cached=min(cached, num_tokens))
        for n, (role, load, cached) in enumerate(described)
    ]
    by_ref = {candidate.ref: candidate.record for candidate in candidates}
    decision = route(policy, request(num_tokens, sequence=sequence), candidates)
    if all(role == "prefill" for role, _, _ in described):
        assert decision is None
        return
    assert decision is not None
    assert by_ref[decision.decode].role != "prefill"
    assert decision.prefill != decision.decode
    if decision.prefill is not None:
        assert by_ref[decision.prefill].role != "decode"
        assert decision.decode.worker_id not in by_ref[decision.prefill].load.cut_off
    assert all(math.isfinite(term) and term >= 0 for term in decision.terms.values())
