"""The policies that `cost` is compared with."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import get_args

import pytest

from phloem.services.gateway.cluster.routing import Candidate, Decision, RoutingPolicy, RoutingRequest, route
from phloem.services.gateway.policies.cache_aware import is_imbalanced
from phloem.services.gateway.policies.snapshot import CacheAwareThresholds
from phloem.shared.protocol.cluster import Role, WorkerLoad
from tests.support.routing import request, worker


def loaded(num_running: int, tree_pages: int = 0) -> WorkerLoad:
    return WorkerLoad(num_running=num_running, tree_pages=tree_pages)


def decide(policy: RoutingPolicy, wanted: RoutingRequest, *candidates: Candidate) -> Decision:
    decision = route(policy, wanted, candidates)
    assert decision is not None
    return decision


def names(decision: Decision) -> tuple[str | None, str]:
    return decision.prefill.worker_id if decision.prefill else None, decision.decode.worker_id


def named(policy: RoutingPolicy, wanted: RoutingRequest, *candidates: Candidate) -> tuple[str | None, str]:
    return names(decide(policy, wanted, *candidates))


# -- prefix --------------------------------------------------------------------------------------------


def test_prefix_follows_the_longest_one_whatever_the_load() -> None:
    workers = [
        worker("p1", "prefill", loaded(50), cached=640),
        worker("p2", "prefill", cached=576),
        worker("d1", "decode", loaded(50), cached=64),
        worker("d2", "decode"),
    ]
    decision = decide("prefix", request(), *workers)
    assert names(decision) == ("p1", "d1")
    assert decision.terms == {
        "prefill_lacking_tokens": 360,
        "prefill_requests": 50,
        "decode_lacking_tokens": 936,
        "decode_requests": 50,
    }


def test_prefix_breaks_ties_by_load() -> None:
    workers = [worker("p1", "prefill", loaded(2), cached=640), worker("p2", "prefill", cached=640)]
    assert named("prefix", request(), *workers, worker("d", "decode")) == ("p2", "d")


# -- turns ---------------------------------------------------------------------------------------------


def test_round_robin_changes_both_sides_with_every_request_and_visits_each_pair() -> None:
    workers = [worker(f"p{n}", "prefill") for n in range(4)] + [worker(f"d{n}", "decode") for n in range(6)]
    chosen = [named("round_robin", request(sequence=n), *workers) for n in range(24)]
    assert len(set(chosen)) == 24
    assert all(a[0] != b[0] and a[1] != b[1] for a, b in pairwise(chosen))


def test_random_shares_out_all_pairs() -> None:
    workers = [worker(f"p{n}", "prefill") for n in range(3)] + [worker(f"d{n}", "decode") for n in range(3)]
    counts = Counter(named("random", request(request_id=str(n)), *workers) for n in range(900))
    assert len(counts) == 9 and min(counts.values()) > 60


@pytest.mark.parametrize("policy", ["least_loaded", "round_robin", "random", "prefix", "cache_aware"])
def test_unified_workers_beside_pairs_get_their_share(policy: RoutingPolicy) -> None:
    workers = [worker("p", "prefill"), worker("d", "decode"), *(worker(f"u{n}", "unified") for n in range(2))]
    decisions = [decide(policy, request(sequence=n, request_id=str(n)), *workers) for n in range(90)]
    kinds = Counter(decision.kind for decision in decisions)
    assert kinds == {"pair": 30, "unified": 60}
    assert {names(decision) for decision in decisions} >= {("p", "d")}


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        (("prefill", "unified"), ("w0", "w1")),
        (("unified", "decode"), ("w0", "w1")),
        (("decode", "decode"), None),
    ],
)
def test_simple_policies_use_what_roles_there_are(
    roles: tuple[Role, Role], expected: tuple[str, str] | None
) -> None:
    workers = [worker(f"w{n}", role) for n, role in enumerate(roles)]
    decision = decide("least_loaded", request(), *workers)
    assert (names(decision) if decision.prefill else None) == expected
    assert decision.kind == ("pair" if expected else "local")


# -- SGLang's cache_aware ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loads", "imbalanced"),
    [
        ([0, 64], False),  # the difference must be more than 64
        ([0, 65], True),
        ([200, 265], False),  # and the ratio more than 1.5
        ([100, 165], True),
        ([7], False),
    ],
)
def test_imbalance_takes_difference_and_ratio(loads: list[int], imbalanced: bool) -> None:
    assert is_imbalanced(loads, CacheAwareThresholds()) is imbalanced


def test_cache_aware_goes_to_the_best_match_while_balanced() -> None:
    workers = [
        worker("p1", "prefill", loaded(60), cached=640),
        worker("p2", "prefill", cached=320),
        worker("d1", "decode", loaded(3), cached=640),
        worker("d2", "decode", loaded(2)),
    ]
    decision = decide("cache_aware", request(), *workers)
    assert names(decision) == ("p1", "d2")  # decode by load alone
    assert decision.terms == {"prefill_lacking_tokens": 360, "decode_requests": 2}


def test_cache_aware_goes_to_the_shortest_queue_when_imbalanced() -> None:
    workers = [worker("p1", "prefill", loaded(70), cached=1000), worker("p2", "prefill", loaded(5))]
    assert named("cache_aware", request(), *workers, worker("d", "decode")) == ("p2", "d")


@pytest.mark.parametrize(("cached", "expected"), [(300, "p1"), (301, "p2")])
def test_cache_aware_goes_to_the_smallest_tree_below_the_threshold(cached: int, expected: str) -> None:
    small = worker("p1", "prefill", loaded(40, tree_pages=10))  # busier, but that doesn't count
    large = worker("p2", "prefill", loaded(0, tree_pages=11), cached=cached)
    assert named("cache_aware", request(), small, large, worker("d", "decode")) == (expected, "d")


def test_cache_aware_counts_prompts_under_way_to_a_tree() -> None:
    small = worker("p1", "prefill", loaded(0, tree_pages=10), own_prefill_tokens=500)
    large = worker("p2", "prefill", loaded(0, tree_pages=11))
    assert named("cache_aware", request(), small, large, worker("d", "decode")) == ("p2", "d")


def test_cache_aware_takes_unified_workers_by_the_same_rule() -> None:
    workers = [worker("u1", "unified", cached=640), worker("u2", "unified")]
    assert named("cache_aware", request(), *workers) == (None, "u1")


# -- pairs without a channel ---------------------------------------------------------------------------

ALL: tuple[RoutingPolicy, ...] = get_args(RoutingPolicy)


@pytest.mark.parametrize("policy", ALL)
def test_pairs_that_are_cut_off_are_never_chosen_and_the_others_are(policy: RoutingPolicy) -> None:
    workers = [
        worker("p1", "prefill", WorkerLoad(cut_off=("d1",))),
        worker("p2", "prefill", WorkerLoad(cut_off=("d2", "d3"))),
        *(worker(name, "decode") for name in ("d1", "d2", "d3")),
    ]
    chosen = {named(policy, request(100_000, request_id=str(n), sequence=n), *workers) for n in range(60)} - {
        (None, "d1"),
        (None, "d2"),
        (None, "d3"),
    }
    assert chosen
    assert chosen <= {("p1", "d2"), ("p1", "d3"), ("p2", "d1")}


@pytest.mark.parametrize("policy", ALL)
def test_decode_worker_that_nobody_reaches_prefills_for_itself(policy: RoutingPolicy) -> None:
    workers = [worker("p", "prefill", WorkerLoad(cut_off=("d",))), worker("d", "decode")]
    assert named(policy, request(), *workers) == (None, "d")


# -- what a decision tells -----------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["cost", "prefix", "least_loaded", "round_robin", "random", "cache_aware"])
def test_decision_lists_the_best_of_each_side_on_request(policy: RoutingPolicy) -> None:
    workers = [worker(f"p{n}", "prefill", cached=64 * n) for n in range(5)]
    workers += [worker(f"d{n}", "decode") for n in range(3)]
    assert decide(policy, request(), *workers).rankings == []
    decision = decide(policy, request(num_explained=2), *workers)
    prefill, decode = decision.rankings[:2]
    assert (prefill.part, prefill.num_workers, len(prefill.best)) == ("prefill", 5, 2)
    assert (decode.part, decode.num_workers, len(decode.best)) == ("decode", 3, 2)
    assert decision.best_cached_tokens == 256
    chosen = next(w for w in workers if w.ref == decision.prefill)
    assert decision.cached_tokens == chosen.cached_tokens
    if policy in ("cost", "prefix"):
        assert [ranked.worker.worker_id for ranked in prefill.best] == ["p4", "p3"]
