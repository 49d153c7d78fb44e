"""The bars of routing, measured: `phloem simulate TRACE --check`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

import msgspec

from phloem.shared.bench.bars import Bar, all_met
from phloem.simulate.options import SimulationOptions
from phloem.simulate.oracle import lru_hit_rate
from phloem.simulate.result import SimulationResult
from phloem.simulate.study import Progress, find_rate_scale, run_all
from phloem.simulate.workload import SimRequest

BUSY_P90_S = (2.0, 4.0)  # round robin's p90 TTFT at the load that policies are compared at
GATEWAY_COUNTS = (1, 2, 4, 8)
NUM_SEEDS = 2  # runs of each: which request evicts which is chaotic, and moves a hit rate by a percent or two
COMPARED = ("least_loaded", "cache_aware")


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """All runs, the hit rates of ideal caches by name, and the bars."""

    results: list[SimulationResult]
    cost: SimulationResult  # with one gateway, at the load of the comparison
    ideal_hit_rates: dict[str, float]
    bars: list[Bar]

    @property
    def at_load(self) -> list[SimulationResult]:
        """What a plot shows side by side: the trace at one load with one seed, and the most gateways."""
        first = self.cost.options
        alike = [
            result
            for result in self.results
            if (result.options.rate_scale, result.options.seed) == (first.rate_scale, first.seed)
        ]
        return [
            result
            for result in alike
            if result.num_requests == self.cost.num_requests
            and result.options.shape.num_gateways in (GATEWAY_COUNTS[0], GATEWAY_COUNTS[-1])
        ]

    @property
    def is_met(self) -> bool:
        return all_met(self.bars) and not any(result.problems for result in self.results)


def check(
    trace: Sequence[SimRequest],
    shared_prefix: Sequence[SimRequest],
    options: SimulationOptions,
    *,
    jobs: int,
    progress: Progress,
) -> Check:
    """Finds the load where round robin is busy, runs the policies there, `cost` with 1 to 8 gateways, and
    `cost` on the workload where one prefix takes half of the requests."""
    low_s, high_s = BUSY_P90_S
    start = msgspec.structs.replace(options, policy="round_robin")
    busy = find_rate_scale(trace, start, low_s=low_s, high_s=high_s, progress=progress)
    at_load = msgspec.structs.replace(options, rate_scale=busy.options.rate_scale)
    others = [msgspec.structs.replace(at_load, policy=policy) for policy in COMPARED]
    several = [
        msgspec.structs.replace(_with_gateways(at_load, count), seed=options.seed + n)
        for count in GATEWAY_COUNTS
        for n in range(NUM_SEEDS)
    ]
    results = run_all(trace, others + several, jobs=jobs, progress=progress)
    by_policy = {result.options.policy: result for result in results[: len(COMPARED)]}
    by_gateways = results[len(COMPARED) :]
    at_its_rate = msgspec.structs.replace(_with_gateways(options, 1), rate_scale=1.0)
    balance = run_all(shared_prefix, [at_its_rate], jobs=jobs, progress=progress)[0]
    ideal = ideal_hit_rates(trace, options)
    cost = by_gateways[0]
    bars = [
        *_load_bars(busy),
        *_policy_bars(cost, busy, by_policy["cache_aware"], ideal["prefill pool"]),
        *_gateway_bars(by_gateways),
        Bar("shared prefix: CoV of the workers' load", balance.load_cov, bound=0.25),
    ]
    return Check(results=[busy, *results, balance], cost=cost, ideal_hit_rates=ideal, bars=bars)


def _load_bars(busy: SimulationResult) -> list[Bar]:
    """Whether the load is the one that policies are to be compared at."""
    low_s, high_s = BUSY_P90_S
    return [
        Bar("round_robin's p90 TTFT, at least", busy.ttft_p90_s, "s", low_s, ">="),
        Bar("round_robin's p90 TTFT, at most", busy.ttft_p90_s, "s", high_s),
    ]


def _policy_bars(
    cost: SimulationResult, busy: SimulationResult, cache_aware: SimulationResult, ideal_hit_rate: float
) -> list[Bar]:
    hits = _ratio(cost.hit_rate, ideal_hit_rate)
    return [
        Bar("hit rate / one LRU cache of the prefill pool", hits, bound=0.92, sense=">="),
        Bar("p90 TTFT: cost / round_robin", cost.ttft_p90_s / busy.ttft_p90_s, bound=0.60),
        Bar("p90 TTFT: cost / cache_aware", cost.ttft_p90_s / cache_aware.ttft_p90_s, bound=0.90),
    ]


def _gateway_bars(by_gateways: Sequence[SimulationResult]) -> list[Bar]:
    ttft = _spread(_means(result.ttft_p90_s for result in by_gateways))
    hits = _spread(_means(result.hit_rate for result in by_gateways))
    return [
        Bar("1 to 8 gateways: spread of p90 TTFT", ttft, bound=0.03),
        Bar("1 to 8 gateways: spread of the hit rate", hits, bound=0.03),
    ]


def ideal_hit_rates(requests: Sequence[SimRequest], options: SimulationOptions) -> dict[str, float]:
    """Of one LRU cache with the memory of all workers that prefill, of all workers, and without end."""
    shape = options.shape
    prefilling = shape.num_prefill or shape.num_unified or shape.num_decode
    return {
        "prefill pool": lru_hit_rate(requests, prefilling * shape.kv_tokens),
        "all workers": lru_hit_rate(requests, shape.num_workers * shape.kv_tokens),
        "infinite": lru_hit_rate(requests, None),
    }


def _with_gateways(options: SimulationOptions, count: int) -> SimulationOptions:
    shape = msgspec.structs.replace(options.shape, num_gateways=count)
    return msgspec.structs.replace(options, policy="cost", shape=shape)


def _ratio(value: float, ideal: float) -> float:
    return value / ideal if ideal else 0.0


def _means(values: Iterable[float]) -> list[float]:
    """One mean over the seeds for each number of gateways."""
    left = list(values)
    return [fmean(left[n : n + NUM_SEEDS]) for n in range(0, len(left), NUM_SEEDS)]


def _spread(values: Sequence[float]) -> float:
    return max(values) / min(values) - 1 if min(values) else 0.0
