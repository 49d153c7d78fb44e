"""The index loses things while workers and gateways go on: exact again within 5 s, look-ups bounded.

Real Valkey, two real cache_index processes, workers with real radix trees, leases and publishers, and the
gateway's client.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from prometheus_client import CollectorRegistry

from benchmarks.index.forest import Forest, follow_replicas, running_forest
from benchmarks.index.stage import Stage, running_stage
from benchmarks.index.world import new_client
from phloem.services.gateway.cluster.index_client import IndexClient
from phloem.shared.protocol.session import PeerRef
from tests.support.waiting import until, until_async

NUM_WORKERS = 4
REPAIR_S = 5.0
# A deadline that a busy test machine keeps when all is well, so that a miss means a loss.
DEADLINE_S = 0.25
# How late an asyncio timer may be on this machine; the client itself adds nothing to its deadline.
TIMER_S = 0.25


class Scene:
    """A cluster's index, its workers, and a gateway that asks all the time."""

    def __init__(self, stage: Stage, forest: Forest, client: IndexClient, metrics: CollectorRegistry) -> None:
        self.stage = stage
        self.forest = forest
        self.patient = new_client(5.0)[0]
        self.slowest_s = 0.0
        self.num_lookups = 0
        self.changing = True
        self._client = client
        self._metrics = metrics

    @property
    def num_failed_open(self) -> float:
        return self._metrics.get_sample_value("phloem_cluster_index_misses_total") or 0.0

    async def ask(self) -> None:
        """One look-up after the other, each timed."""
        rng = random.Random(1)
        while True:
            start = time.perf_counter()
            await self._client.lookup(rng.choice(self.forest.prompts.hashes))
            self.slowest_s = max(self.slowest_s, time.perf_counter() - start)
            self.num_lookups += 1
            await asyncio.sleep(0.005)

    async def change(self) -> None:
        """Requests are served: trees change."""
        while True:
            if self.changing:
                for worker in self.forest.workers:
                    worker.change()
            await asyncio.sleep(0.02)

    async def is_exact(self) -> bool:
        return not await self.forest.difference(self.patient, 30)

    async def repaired(self) -> float:
        """Stops changes, waits until the index is exact; seconds that it took. Fails after `REPAIR_S`."""
        self.changing = False
        start = time.perf_counter()
        try:
            await until_async(self.is_exact, timeout_s=REPAIR_S)
        except TimeoutError:
            pytest.fail(await self.forest.difference(self.patient, 30) or "exact, but late")
        return time.perf_counter() - start


@asynccontextmanager
async def playing(*index_flags: str) -> AsyncIterator[Scene]:
    with running_stage(2, *index_flags) as stage:
        async with running_forest(stage.redis_url, NUM_WORKERS, random.Random(0), num_prompts=60) as forest:
            client, metrics = new_client(DEADLINE_S)
            scene = Scene(stage, forest, client, metrics)
            jobs = [follow_replicas(stage.redis_url, each) for each in (client, scene.patient)]
            tasks = [asyncio.create_task(job) for job in (*jobs, scene.change())]
            try:
                await until(lambda: client.num_replicas == 2, timeout_s=30.0)
                await until(lambda: all(len(worker.blocks()) > 100 for worker in forest.workers))
                await scene.repaired()
                scene.changing = True
                tasks.append(asyncio.create_task(scene.ask()))
                yield scene
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await client.close()
                await scene.patient.close()


async def flush(scene: Scene) -> None:
    await scene.forest.registry.link.command("FLUSHALL")


async def restart_redis_empty(scene: Scene) -> None:
    scene.stage.kill_valkey()
    asked = scene.num_lookups
    failed_open = scene.num_failed_open
    await until(lambda: scene.num_lookups >= asked + 20)
    assert scene.num_failed_open > failed_open, "look-ups without Redis are counted"
    scene.stage.start_valkey()
    await scene.forest.registry.connect(10.0, on_wait=lambda _: None)


async def kill_a_replica(scene: Scene) -> None:
    scene.stage.kill_replica("index-0")


async def restart_both_replicas(scene: Scene) -> None:
    for name in ("index-0", "index-1"):
        scene.stage.kill_replica(name)
        scene.stage.start_replica(name)
    started = {f"service:cache_index/{name}" for name in ("index-0", "index-1")}
    before = {name: record.epoch for name, record in (await scene.forest.registry.read()).services.items()}

    async def registered() -> bool:
        services = (await scene.forest.registry.read()).services
        return all(name in services and services[name].epoch > before.get(name, 0) for name in started)

    await until_async(registered, timeout_s=30.0)


async def restart_a_worker(scene: Scene) -> None:
    worker = await scene.forest.start_worker("worker-0")
    await until(lambda: len(worker.blocks()) > 20)


@pytest.mark.parametrize(
    "lose", [flush, restart_redis_empty, kill_a_replica, restart_both_replicas, restart_a_worker]
)
async def test_index_is_exact_again_and_no_lookup_passes_its_deadline(
    lose: Callable[[Scene], Awaitable[None]],
) -> None:
    async with playing() as scene:
        await lose(scene)
        asked = scene.num_lookups
        assert await scene.repaired() <= REPAIR_S
        await until(lambda: scene.num_lookups > asked + 10)
        assert scene.slowest_s <= DEADLINE_S + TIMER_S


async def test_block_that_redis_lost_alone_is_found_by_a_digest() -> None:
    async with playing() as scene:
        await scene.repaired()
        link = scene.forest.registry.link
        keys = await link.command("KEYS", "phloem:ix:b:*")
        await link.command("DEL", *keys[: len(keys) // 2])
        assert not await scene.is_exact()
        await until_async(scene.is_exact, timeout_s=30.0)
        found = [
            worker.prometheus.get_sample_value("phloem_index_digests_total", {"result": "different"})
            for worker in scene.forest.workers
        ]
        assert sum(value or 0.0 for value in found) >= NUM_WORKERS - 1


async def test_soak_leaves_every_bit_as_the_trees_have_it() -> None:
    """A small `benchmarks/soak_index.py`."""
    async with playing() as scene:
        rng = random.Random(7)
        for number in range(4_000):
            rng.choice(scene.forest.workers).change()
            if number % 20 == 0:
                await asyncio.sleep(0)
        await scene.repaired()
        stored = await scene.forest.stored()
        assert PeerRef("", 0) not in stored, "a bit without a slot"
