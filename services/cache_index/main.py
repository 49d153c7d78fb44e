"""A cache_index replica, from its flags to a server that answers until it is told to stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import secrets
from contextlib import AsyncExitStack, aclosing

from prometheus_client import CollectorRegistry

from phloem.services.cache_index.announcer import Announcer
from phloem.services.cache_index.config import CacheIndexConfig
from phloem.services.cache_index.matcher import Matcher
from phloem.services.cache_index.metrics import IndexMetrics
from phloem.services.cache_index.near_cache import NearCache
from phloem.services.cache_index.service import IndexService
from phloem.services.cache_index.slots import Slots
from phloem.services.cache_index.store import BlockStore
from phloem.services.cache_index.sweeper import Sweeper
from phloem.shared.config.bind_host import resolve_host
from phloem.shared.discovery.lease import LeaseKeeper, ServiceLease
from phloem.shared.discovery.redis_link import RedisLink
from phloem.shared.discovery.registry import Registry
from phloem.shared.discovery.secret import cluster_secret, reassert_secret
from phloem.shared.discovery.snapshot import ClusterSnapshot
from phloem.shared.errors import PhloemError
from phloem.shared.host_port import host_port
from phloem.shared.lifecycle.service import stop_event
from phloem.shared.protocol.cluster import ServiceRecord
from phloem.shared.rpc.server import RpcServer
from phloem.shared.telemetry.metrics import MetricsServer, new_registry

log = logging.getLogger(__name__)


async def run(config: CacheIndexConfig) -> None:
    """Serves until SIGTERM. Raises `PhloemError` when it can't start."""
    stop = stop_event()
    host = resolve_host(config.host)
    async with AsyncExitStack() as stack:
        registry = Registry(config.redis_url)
        stack.push_async_callback(registry.close)
        await registry.connect(config.redis_wait_s)
        secret = await cluster_secret(registry, config.cluster_secret)
        link = RedisLink(config.redis_url, max_connections=config.redis_connections)
        stack.push_async_callback(link.close)

        prometheus = new_registry("cache_index")
        replica = Replica(config, registry, link, prometheus)
        await replica.look_around()
        server = RpcServer(secret)
        replica.service.add_to(server)
        port = await server.start(host, config.port)
        stack.push_async_callback(server.stop, config.drain_timeout_s)
        scrape = await MetricsServer.start(prometheus, host, config.metrics_port)
        stack.push_async_callback(scrape.close)
        address = host_port(config.advertise_host or host, port)
        gc.collect()
        gc.freeze()  # what lives as long as the process is not looked at again while look-ups wait
        log.info("serving", extra={"address": address, "metrics_port": scrape.port})
        await replica.serve(address, secret, stop)


class Replica:
    """The parts of one replica, and the tasks that keep them up to date."""

    def __init__(
        self, config: CacheIndexConfig, registry: Registry, link: RedisLink, prometheus: CollectorRegistry
    ) -> None:
        self._config = config
        self._registry = registry
        metrics = IndexMetrics(prometheus)
        store = BlockStore(
            link, read_timeout_s=config.match_timeout_s, write_timeout_s=config.publish_timeout_s
        )
        slots = Slots(link, config.max_slots)
        near = NearCache(max_blocks=config.near_cache_blocks, ttl_s=config.near_cache_ttl_s)
        self._matcher = Matcher(store, slots, near, metrics, timeout_s=config.match_timeout_s)
        self._announcer = Announcer(store, metrics, ttl_s=config.announce_ttl_s)
        self._sweeper = Sweeper(
            store, slots, metrics, interval_s=config.sweep_interval_s, grace_s=config.slot_grace_s
        )
        self.service = IndexService(store, slots, self._matcher, near, self._announcer, metrics)
        self._regained = asyncio.Event()

    async def look_around(self) -> None:
        """Reads once who lives, so that the first call is answered right."""
        async with aclosing(self._registry.watch()) as snapshots:
            self._observe(await anext(snapshots))

    async def serve(self, address: str, secret: bytes, stop: asyncio.Event) -> None:
        """Registers under `address` and works until `stop` is set; then gives the registration back."""
        record = ServiceRecord(
            kind="cache_index",
            service_id=self._config.service_id or f"index-{secrets.token_hex(4)}",
            epoch=await self._registry.next_epoch(),
            address=address,
        )
        keeper = LeaseKeeper(ServiceLease(self._registry, record), on_regained=self._regained.set)
        await keeper.acquire()
        try:
            async with asyncio.TaskGroup() as tasks:
                jobs = [keeper.run(), self._watch(), self._sweeper.run(), self._announcer.run()]
                jobs.append(self._keep_secret(secret))
                running = [tasks.create_task(job) for job in jobs]
                await stop.wait()
                for task in running:
                    task.cancel()
        finally:
            await keeper.close()

    def _observe(self, snapshot: ClusterSnapshot) -> None:
        self._matcher.set_snapshot(snapshot)
        self._sweeper.set_snapshot(snapshot)

    async def _watch(self) -> None:
        async for snapshot in self._registry.watch():
            self._observe(snapshot)

    async def _keep_secret(self, secret: bytes) -> None:
        """Puts an agreed secret back whenever Redis lost its data; a configured one is never written."""
        while True:
            await self._regained.wait()
            self._regained.clear()
            if self._config.cluster_secret:
                continue
            try:
                await reassert_secret(self._registry, secret)
            except PhloemError as error:
                log.warning("the cluster secret was not put back: %s", error)
