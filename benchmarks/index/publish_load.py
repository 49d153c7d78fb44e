"""Eight workers' index publishers at a fixed rate, in a process of their own: a step's blocks every 20 ms.

Prints "begin", and at the end a JSON line with what the index confirmed. Run by bench_index.py.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time

import msgspec
import uvloop
from prometheus_client import CollectorRegistry

from benchmarks.index.world import SECRET
from phloem.shared.protocol.session import PeerRef
from phloem.shared.worker.index_publisher import IndexPublisher
from phloem.shared.worker.metrics import WorkerMetrics

STEP_S = 0.02
CONFIRM_S = 0.5
TREE_BLOCKS = 12_000  # about what a GPU of 80 GB holds of an 8B model; the oldest blocks are evicted


class Outcome(msgspec.Struct, frozen=True):
    """Block changes, stored and removed, that came within `seconds`, and how many of them the index had
    confirmed `CONFIRM_S` later."""

    offered: int
    confirmed: int
    seconds: float


class Worker:
    """A tree that stores and evicts at random names, and its publisher."""

    def __init__(self, worker: PeerRef, rng: random.Random) -> None:
        self.metrics = CollectorRegistry()
        self._publisher = IndexPublisher(worker, SECRET, self._dump, WorkerMetrics(self.metrics))
        self._rng = rng
        self._tree: dict[bytes, None] = {}
        self.run = self._publisher.run

    def start(self, address: str) -> None:
        self._publisher.set_addresses([address])

    def step(self, num_changes: int) -> None:
        """Half of a full tree's changes are evictions."""
        full = len(self._tree) >= TREE_BLOCKS
        removed = (
            [block for block, _ in zip(self._tree, range(num_changes // 2), strict=False)] if full else []
        )
        stored = [self._rng.randbytes(16) for _ in range(num_changes - len(removed))]
        for block in removed:
            del self._tree[block]
        self._tree.update(dict.fromkeys(stored))
        self._publisher.note(stored, removed)

    def confirmed(self) -> float:
        names = ("stored", "removed")
        values = [
            self.metrics.get_sample_value("phloem_index_blocks_published_total", {"change": name})
            for name in names
        ]
        return sum(value or 0.0 for value in values)

    def _dump(self) -> None:
        self._publisher.on_tree_dump(list(self._tree))


async def load(address: str, num_workers: int, blocks_per_s: float, seconds: float) -> Outcome:
    workers = [Worker(PeerRef(f"publisher-{n}", 1), random.Random(n)) for n in range(num_workers)]
    tasks = [asyncio.create_task(worker.run()) for worker in workers]
    for worker in workers:
        worker.start(address)
    num_changes = round(blocks_per_s * STEP_S / num_workers)
    offered = 0
    print("begin", flush=True)
    start = time.perf_counter()
    for turn in range(round(seconds / STEP_S * num_workers)):  # workers step independently of each other
        await asyncio.sleep(start + turn * STEP_S / num_workers - time.perf_counter())
        workers[turn % num_workers].step(num_changes)
        offered += num_changes
    elapsed = time.perf_counter() - start
    await asyncio.sleep(CONFIRM_S)
    confirmed = sum(worker.confirmed() for worker in workers)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return Outcome(offered, round(confirmed), elapsed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--blocks-per-s", type=float, default=20_000)
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    outcome = uvloop.run(load(options.address, options.workers, options.blocks_per_s, options.seconds))
    print(msgspec.json.encode(outcome).decode())


if __name__ == "__main__":
    main()
