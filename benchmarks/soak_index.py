"""Random inserts and evictions on many workers, and then the index must equal the union of their trees.

    python benchmarks/soak_index.py [--operations 100000] [--workers 16] [--seed 0] [--disrupt]

Real radix trees, leases and publishers, two cache_index processes, a Valkey. `--disrupt` flushes Redis after
a fifth of the operations, restarts it empty after another, kills and restarts a replica, and a worker.
Look-ups run all the while, under a gateway's deadline. At the end every bit in Redis and the answers to all
prompts are compared with the trees. Exit status 1 when they differ 5 s after the last change.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from typing import NamedTuple

import uvloop

from benchmarks.index.forest import Forest, follow_replicas, running_forest
from benchmarks.index.stage import Stage, running_stage
from benchmarks.index.world import new_client
from phloem.services.gateway.cluster.index_client import IndexClient

NUM_REPLICAS = 2
OPERATIONS_PER_PAUSE = 5
PAUSE_S = 0.001
LOOKUP_INTERVAL_S = 0.005
DEADLINE_S = 0.005
SETTLE_S = 5.0
DISRUPTIONS = ("flush Redis", "restart Redis", "restart a replica", "restart a worker")


class Options(NamedTuple):
    operations: int
    workers: int
    seed: int
    disrupt: bool


class Lookups:
    """A gateway that never stops asking."""

    def __init__(self, client: IndexClient, forest: Forest, rng: random.Random) -> None:
        self._client = client
        self._forest = forest
        self._rng = rng
        self.count = 0
        self.slowest_s = 0.0

    async def run(self) -> None:
        while True:
            chain = self._rng.choice(self._forest.prompts.hashes)
            start = time.perf_counter()
            await self._client.lookup(chain)
            self.slowest_s = max(self.slowest_s, time.perf_counter() - start)
            self.count += 1
            await asyncio.sleep(LOOKUP_INTERVAL_S)


async def disrupt(what: str, stage: Stage, forest: Forest) -> None:
    print(f"  {what}", flush=True)
    match what:
        case "flush Redis":
            await forest.registry.link.command("FLUSHALL")
        case "restart Redis":
            stage.kill_valkey()
            await asyncio.sleep(1.0)
            stage.start_valkey()
            await forest.registry.connect(10.0, on_wait=lambda _: None)
        case "restart a replica":
            stage.kill_replica("index-0")
            stage.start_replica("index-0")
        case "restart a worker":
            await forest.start_worker("worker-0")


async def change(options: Options, stage: Stage, forest: Forest, rng: random.Random) -> None:
    part = max(1, options.operations // (len(DISRUPTIONS) + 1))
    for number in range(1, options.operations + 1):
        rng.choice(forest.workers).change()
        if number % OPERATIONS_PER_PAUSE == 0:
            await asyncio.sleep(PAUSE_S)
        if options.disrupt and number % part == 0 and number // part <= len(DISRUPTIONS):
            await disrupt(DISRUPTIONS[number // part - 1], stage, forest)


async def settle(forest: Forest, client: IndexClient) -> tuple[str, float]:
    """(what still differs, seconds until nothing did)."""
    start = time.perf_counter()
    difference = "nothing was compared"
    while difference and time.perf_counter() - start < SETTLE_S:
        await asyncio.sleep(0.1)
        difference = await forest.difference(client, len(forest.prompts.hashes))
    return difference, time.perf_counter() - start


async def soak(options: Options) -> bool:
    rng = random.Random(options.seed)
    with running_stage(NUM_REPLICAS) as stage:
        async with running_forest(stage.redis_url, options.workers, rng) as forest:
            impatient, metrics = new_client(DEADLINE_S)
            patient, _ = new_client(2.0)
            lookups = Lookups(impatient, forest, rng)
            jobs = [follow_replicas(stage.redis_url, client) for client in (impatient, patient)]
            tasks = [asyncio.create_task(job) for job in (*jobs, lookups.run())]
            start = time.perf_counter()
            await change(options, stage, forest, rng)
            seconds = time.perf_counter() - start
            difference, settled_s = await settle(forest, patient)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for client in (impatient, patient):
                await client.close()
            missed = metrics.get_sample_value("phloem_cluster_index_misses_total") or 0.0
            stored = sum(len(worker.blocks()) for worker in forest.workers)
    print(
        f"{options.operations} operations on {options.workers} workers in {seconds:.1f} s; {stored} blocks "
        f"held; {lookups.count} look-ups meanwhile, {missed:.0f} failed open, slowest "
        f"{lookups.slowest_s * 1e3:.1f} ms"
    )
    print(difference or f"exact after {settled_s:.1f} s: no false hold, none missing")
    return not difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--operations", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--disrupt", action="store_true")
    options = Options(**vars(parser.parse_args()))
    sys.exit(0 if uvloop.run(soak(options)) else 1)


if __name__ == "__main__":
    main()
