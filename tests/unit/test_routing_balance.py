"""A prefix that takes half of the traffic: `cost` gives it to as many workers as its load needs.

Workers here are a queue and a set of prefixes, no more; `phloem simulate` runs the real engines' parts.
"""

from __future__ import annotations

import random
from statistics import fmean, pstdev

import pytest

from phloem.services.gateway.cluster.routing import Candidate, RoutingPolicy, RoutingRequest, route
from phloem.shared.protocol.cluster import WorkerLoad
from tests.support.routing import request, worker

NUM_PREFILL = 8
RATE = 20_000.0  # prompt tokens a second of each worker
PREFIX_TOKENS = 4096
NUM_PREFIXES = 64  # beside the hot one, which is 0


class Prefiller:
    """Computes prompts one after the other, and keeps every prefix."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.free_at_s = 0.0
        self.busy_s = 0.0
        self.num_requests = 0
        self.prefixes: set[int] = set()

    def candidate(self, prefix: int, now_s: float) -> Candidate:
        queued = round(max(0.0, self.free_at_s - now_s) * RATE)
        load = WorkerLoad(queued_tokens=queued, num_waiting=queued > 0, prefill_tokens_per_s=RATE)
        return worker(self.name, "prefill", load, cached=PREFIX_TOKENS if prefix in self.prefixes else 0)

    def compute(self, prefix: int, num_tokens: int, now_s: float) -> float:
        """Seconds from now to the first token."""
        cached = PREFIX_TOKENS if prefix in self.prefixes else 0
        seconds = (num_tokens - cached) / RATE
        self.prefixes.add(prefix)
        self.free_at_s = max(self.free_at_s, now_s) + seconds
        self.busy_s += seconds
        self.num_requests += 1
        return self.free_at_s - now_s


def serve(policy: RoutingPolicy, *, rate: float, num_requests: int = 3000) -> tuple[list[Prefiller], float]:
    """Poisson arrivals, `rate` a second; the workers, and the 90th percentile of the time to first token."""
    rng = random.Random(7)
    prefillers = [Prefiller(f"p{n}") for n in range(NUM_PREFILL)]
    by_name = {prefiller.name: prefiller for prefiller in prefillers}
    roomy = WorkerLoad(free_pages=10**6, total_pages=10**6, num_running=30, prefill_tokens_per_s=RATE)
    decoder = worker("d", "decode", roomy)
    now_s, waits = 0.0, []
    for index in range(num_requests):
        now_s += rng.expovariate(rate)
        prefix = 0 if rng.random() < 0.5 else rng.randint(1, NUM_PREFIXES)
        num_tokens = PREFIX_TOKENS + rng.randint(256, 4096)
        wanted: RoutingRequest = request(num_tokens, request_id=str(index), sequence=index)
        decision = route(policy, wanted, [*(p.candidate(prefix, now_s) for p in prefillers), decoder])
        assert decision is not None and decision.prefill is not None
        waits.append(by_name[decision.prefill.worker_id].compute(prefix, num_tokens, now_s))
    return prefillers, sorted(waits)[num_requests * 9 // 10]


def spread(prefillers: list[Prefiller]) -> float:
    """Coefficient of variation of the workers' busy time."""
    busy = [prefiller.busy_s for prefiller in prefillers]
    return pstdev(busy) / fmean(busy)


@pytest.mark.parametrize("rate", [35, 45, 65])
def test_half_of_the_traffic_on_one_prefix_is_spread_evenly(rate: float) -> None:
    """The workers are busy half, two thirds and nearly all of the time. (With less, nothing waits, requests
    follow their prefix, and evenness would only cost.)"""
    prefillers, _ = serve("cost", rate=rate)
    assert spread(prefillers) <= 0.25


def test_following_the_prefix_alone_is_not_even() -> None:
    prefillers, wait_s = serve("prefix", rate=45)
    assert spread(prefillers) > 0.5
    assert serve("cost", rate=45)[1] < wait_s / 10


def test_hot_prefix_is_held_by_more_workers_as_load_grows() -> None:
    holders = [
        sum(0 in p.prefixes for p in serve("cost", rate=rate, num_requests=300)[0]) for rate in (2, 65)
    ]
    assert holders[0] <= 3 and holders[1] >= 6


def test_prefix_is_recomputed_elsewhere_once_its_holders_queue_costs_more() -> None:
    wanted = request(4096 + 500)
    for queued, expected in ((4000, "holder"), (4200, "other")):
        busy = WorkerLoad(queued_tokens=queued, prefill_tokens_per_s=RATE)
        workers = [worker("holder", "prefill", busy, cached=4096), worker("other", "prefill", WorkerLoad())]
        decision = route("cost", wanted, [*workers, worker("d", "decode", WorkerLoad(num_running=200))])
        assert decision is not None and decision.prefill is not None
        assert decision.prefill.worker_id == expected
