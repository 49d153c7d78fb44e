"""Several simulations of one workload: side by side, and the search for a load."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import msgspec

from phloem.simulate.options import SimulationOptions
from phloem.simulate.result import SimulationResult, run
from phloem.simulate.workload import SimRequest

Progress = Callable[[str], None]

_MAX_TRIALS = 12
_MARGIN = 1.05  # a found load is this far from either limit


def run_all(
    requests: Sequence[SimRequest], runs: Sequence[SimulationOptions], *, jobs: int, progress: Progress
) -> list[SimulationResult]:
    """One result for each of `runs`, in their order, `jobs` at a time in processes of their own."""
    results: list[SimulationResult] = []
    for result in _results(requests, runs, jobs):
        results.append(result)
        progress(_line(result))
    return results


def find_rate_scale(
    requests: Sequence[SimRequest],
    options: SimulationOptions,
    *,
    low_s: float,
    high_s: float,
    progress: Progress,
) -> SimulationResult:
    """A run at a `rate_scale` where p90 TTFT lies within [low_s, high_s]: doubles or halves until
    the aim is between two scales, then bisects. The last trial when none hits."""
    aim = math.sqrt(low_s * high_s)
    low = high = None
    scale = options.rate_scale
    for _ in range(_MAX_TRIALS):
        result = run(requests, msgspec.structs.replace(options, rate_scale=scale))
        progress(_line(result))
        p90 = result.ttft_p90_s
        if low_s * _MARGIN <= p90 <= high_s / _MARGIN:
            break
        if p90 < aim:
            low = scale
        else:
            high = scale
        if low is not None and high is not None:
            scale = math.sqrt(low * high)
        else:
            scale = scale * 2 if high is None else scale / 2
    return result


def _results(
    requests: Sequence[SimRequest], runs: Sequence[SimulationOptions], jobs: int
) -> Iterator[SimulationResult]:
    if jobs <= 1 or len(runs) <= 1:
        yield from (run(requests, options) for options in runs)
        return
    with ProcessPoolExecutor(max_workers=min(jobs, len(runs))) as pool:
        yield from pool.map(partial(run, requests), runs)


def _line(result: SimulationResult) -> str:
    options = result.options
    return (
        f"{options.policy}, {options.shape.num_gateways} gateway(s), rate x{options.rate_scale:.3g}: "
        f"p90 TTFT {result.ttft_p90_s:.2f} s, hit rate {result.hit_rate:.1%}"
    )
