"""What a simulation found, by policy."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, pstdev

import msgspec

from phloem.shared.bench.statistics import quantile
from phloem.simulate.cluster import SimulatedCluster
from phloem.simulate.options import SimulationOptions
from phloem.simulate.outcome import Outcome
from phloem.simulate.workload import SimRequest


class Balance(msgspec.Struct, frozen=True, kw_only=True):
    """How evenly the work of one role was spread: `load_cov` is the standard deviation of the workers' busy
    device seconds over their mean, `utilization` their mean share of the run."""

    role: str
    num_workers: int
    load_cov: float
    utilization: float


class SimulationResult(msgspec.Struct, frozen=True, kw_only=True):
    """One run. Seconds; `hit_rate` is the share of prompt tokens that the worker which computed the prompt
    found in its own tree. `ttfts_s` are in order of the workload."""

    options: SimulationOptions
    num_requests: int
    simulated_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p90_s: float
    hit_rate: float
    local_share: float
    balance: list[Balance]
    num_retractions: int
    num_retries: int
    ttfts_s: list[float]
    problems: list[str] = []

    @property
    def load_cov(self) -> float:
        """Of the role that is spread worst."""
        return max(balance.load_cov for balance in self.balance)


def run(requests: Sequence[SimRequest], options: SimulationOptions) -> SimulationResult:
    """Simulates one policy over the workload and sums it up."""
    cluster = SimulatedCluster(requests, options)
    outcomes = cluster.run()
    return _summed_up(cluster, outcomes)


def _summed_up(cluster: SimulatedCluster, outcomes: Sequence[Outcome]) -> SimulationResult:
    ttfts = sorted(outcome.ttft_s for outcome in outcomes)
    tpots = sorted(outcome.tpot_s for outcome in outcomes if outcome.num_output_tokens > 1) or [0.0]
    return SimulationResult(
        options=cluster.options,
        num_requests=len(outcomes),
        simulated_s=cluster.events.now_s,
        ttft_p50_s=quantile(ttfts, 0.5),
        ttft_p90_s=quantile(ttfts, 0.9),
        ttft_p99_s=quantile(ttfts, 0.99),
        tpot_p50_s=quantile(tpots, 0.5),
        tpot_p90_s=quantile(tpots, 0.9),
        hit_rate=sum(o.cached_tokens for o in outcomes) / sum(o.num_tokens for o in outcomes),
        local_share=fmean(outcome.is_local for outcome in outcomes),
        balance=_balance(cluster),
        num_retractions=sum(worker.scheduler.num_retractions for worker in cluster.workers),
        num_retries=sum(outcome.num_attempts - 1 for outcome in outcomes),
        ttfts_s=[round(outcome.ttft_s, 6) for outcome in outcomes],
        problems=cluster.problems(),
    )


def _balance(cluster: SimulatedCluster) -> list[Balance]:
    found = []
    for role in ("prefill", "decode", "unified"):
        busy = [worker.busy_s for worker in cluster.workers if worker.role == role]
        if busy:
            mean = fmean(busy)
            found.append(
                Balance(
                    role=role,
                    num_workers=len(busy),
                    load_cov=pstdev(busy) / mean if mean else 0.0,
                    utilization=mean / cluster.events.now_s,
                )
            )
    return found
