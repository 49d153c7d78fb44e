"""How long a routing decision takes, by policy and size of the cluster, explanation included.

    python benchmarks/bench_routing.py [--decisions 300] [--check]

One process, no network: `route` over a snapshot of P prefill and P decode workers, in CPU time of its thread.
`busy`: every worker has its own load, rates and prefix; `idle`: all are equal, so that each decision also
draws among all. `--check`: exit status 1 when `cost` takes more than 500 us at 128 x 128 (median, busy).
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
from typing import get_args

from phloem.services.gateway.cluster.routing import Candidate, RoutingPolicy, RoutingRequest, route
from phloem.shared.bench.bars import Bar, all_met, bar_lines
from phloem.shared.protocol.cluster import Role, WorkerLoad
from tests.support.worker_records import new_record

SIZES = (8, 32, 128)
NUM_EXPLAINED = 5  # as the gateway's router asks for
BAR_US = 500.0


def candidate(role: Role, number: int, rng: random.Random | None) -> Candidate:
    """A worker; without `rng` like every other of its role."""
    load = WorkerLoad(
        num_running=rng.randint(0, 200) if rng else 0,
        queued_tokens=rng.randint(0, 50_000) if rng else 0,
        free_pages=rng.randint(0, 50_000) if rng else 50_000,
        total_pages=50_000,
        prefill_tokens_per_s=rng.uniform(3e4, 5e4) if rng else 4e4,
        decode_step_s=rng.uniform(0.005, 0.02) if rng else 0.005,
        transfer_bytes_per_s=rng.uniform(5e10, 3e11) if rng else 1e11,
    )
    record = new_record(
        f"{role}-{number}",
        role,
        context_length=131_072,
        kv_bytes_per_token=131_072,
        max_running_requests=256,
        load=load,
    )
    cached = 64 * rng.choice((0, 0, rng.randint(1, 120))) if rng else 0
    return Candidate(record=record, cached_tokens=cached)


def snapshot(size: int, *, busy: bool) -> list[Candidate]:
    """`size` workers of each role."""
    rng = random.Random(size) if busy else None
    roles: tuple[Role, ...] = ("prefill", "decode")
    return [candidate(role, number, rng) for role in roles for number in range(size)]


def measure(policy: RoutingPolicy, candidates: list[Candidate], num_decisions: int) -> tuple[float, float]:
    """Median and 99th percentile, in microseconds."""
    took = []
    gc.disable()
    for number in range(num_decisions):
        request = RoutingRequest(
            request_id=f"req-{number}",
            num_tokens=8000,
            max_new_tokens=256,
            sequence=number,
            num_explained=NUM_EXPLAINED,
        )
        start = time.thread_time()
        route(policy, request, candidates)
        took.append(1e6 * (time.thread_time() - start))
    gc.enable()
    took.sort()
    return took[len(took) // 2], took[len(took) * 99 // 100]


def main() -> int:
    parser = argparse.ArgumentParser(description="How long a routing decision takes.")
    parser.add_argument("--decisions", type=int, default=300)
    parser.add_argument("--check", action="store_true", help="exit with 1 when the bar is missed")
    options = parser.parse_args()
    print("us, p50 / p99     " + "".join(f"{f'{size} x {size}':>18}" for size in SIZES))
    medians: dict[tuple[str, int, bool], float] = {}
    for busy in (True, False):
        for policy in get_args(RoutingPolicy):
            cells = []
            for size in SIZES:
                p50, p99 = measure(policy, snapshot(size, busy=busy), options.decisions)
                medians[policy, size, busy] = p50
                cells.append(f"{p50:.0f} / {p99:.0f}")
            name = f"{policy}, {'busy' if busy else 'idle'}"
            print(f"{name:18}" + "".join(f"{cell:>18}" for cell in cells), flush=True)
    bars = [Bar("cost at 128 x 128", medians["cost", SIZES[-1], True], "us", BAR_US)]
    print("\n".join(bar_lines(bars)))
    return int(options.check and not all_met(bars))


if __name__ == "__main__":
    sys.exit(main())
