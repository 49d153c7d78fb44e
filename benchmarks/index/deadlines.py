"""Look-ups under a gateway's real deadline, while eight workers publish from another process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable

import msgspec
from prometheus_client import CollectorRegistry

from benchmarks.index.lookups import Barrage
from benchmarks.index.publish_load import Outcome
from benchmarks.index.world import World, new_client
from phloem.services.gateway.cluster.index_client import IndexClient
from phloem.shared.protocol.session import PeerRef
from tests.support.worker_records import record_of

DEADLINE_S = 0.005
PUBLISH_RATE = 20_000.0
PUBLISHERS = 8


class Deadlines(msgspec.Struct, frozen=True):
    """Look-ups under their deadline while others publish."""

    lookups: int
    missed: int
    published: Outcome


def start_publishers(address: str, seconds: float) -> subprocess.Popen[bytes]:
    """Prints a line when it begins, and its outcome when it ends."""
    command = [sys.executable, "-m", "benchmarks.index.publish_load", address]
    command += ["--workers", str(PUBLISHERS), "--blocks-per-s", str(PUBLISH_RATE), "--seconds", str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


async def bench_deadlines(
    world: World, next_prompt: Callable[[], list[bytes]], *, rate: float, seconds: float
) -> Deadlines:
    """Look-ups by a gateway's client with its real deadline, while another process publishes."""
    for number in range(PUBLISHERS):
        await world.registry.renew_worker(record_of(PeerRef(f"publisher-{number}", 1)))
    gateway = new_client(DEADLINE_S)
    await gateway[0].set_addresses([world.address])
    load = start_publishers(world.address, seconds + 1.0)
    assert load.stdout is not None
    await asyncio.to_thread(load.stdout.readline)
    missed_before = await lookups_missed(gateway, next_prompt, rate, 0.5)  # the connection's first calls
    missed = await lookups_missed(gateway, next_prompt, rate, seconds) - missed_before
    out, _ = await asyncio.to_thread(load.communicate)
    await gateway[0].close()
    return Deadlines(round(seconds * rate), round(missed), msgspec.json.decode(out, type=Outcome))


async def lookups_missed(
    gateway: tuple[IndexClient, CollectorRegistry],
    next_prompt: Callable[[], list[bytes]],
    rate: float,
    seconds: float,
) -> float:
    """How many look-ups the client has ever failed open, after `seconds` more of them."""
    client, prometheus = gateway
    num_calls = round(seconds * rate)
    prompts = iter([next_prompt() for _ in range(num_calls)])
    lookups = Barrage(lambda: client.lookup(next(prompts)), time.perf_counter() + 0.05, 1.0 / rate)
    await lookups.run(num_calls)
    missed = prometheus.get_sample_value("phloem_cluster_index_misses_total")
    assert missed is not None
    return missed
