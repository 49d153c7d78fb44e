"""Holds one lease for as long as the process lives."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from phloem.shared.discovery.registry import Registry, Renewal
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.cluster import ServiceRecord, WorkerLoad, WorkerRecord

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0


class Lease(Protocol):
    """Something that must be renewed: a worker's or a service's registration, a device claim."""

    ttl_s: float

    async def renew(self) -> Renewal: ...

    async def release(self) -> None: ...


class WorkerLease:
    """A worker's registration; `record` gives the latest one, load included."""

    def __init__(self, registry: Registry, record: Callable[[], WorkerRecord]) -> None:
        self.ttl_s = registry.lease_ttl_s
        self._registry = registry
        self._record = record
        self._announced: WorkerRecord | None = None

    async def renew(self) -> Renewal:
        record = self._record()
        # Watchers are told at once of everything but the load, which the poll carries.
        without_load = msgspec.structs.replace(record, load=WorkerLoad())
        renewal = await self._registry.renew_worker(record, notify=without_load != self._announced)
        self._announced = without_load
        return renewal

    async def release(self) -> None:
        record = self._record()
        await self._registry.deregister_worker(record.worker_id, record.epoch)


class ServiceLease:
    """The registration of a gateway or an index replica."""

    def __init__(self, registry: Registry, record: ServiceRecord) -> None:
        self.ttl_s = registry.lease_ttl_s
        self._registry = registry
        self._record = record

    async def renew(self) -> Renewal:
        return await self._registry.renew_service(self._record)

    async def release(self) -> None:
        record = self._record
        await self._registry.deregister_service(record.kind, record.service_id, record.epoch)


class LeaseKeeper:
    """Renews a lease every heartbeat and takes it again after a loss.

    `on_lost` is called when the lease was found missing, has run out because Redis can't be reached, or the
    server restarted; `on_regained` when it is held again after that (then whatever else was in Redis, such as
    the blocks in the index, must be published anew). Both are called on the event loop and must not block.
    """

    def __init__(
        self,
        lease: Lease,
        *,
        heartbeat_s: float = HEARTBEAT_S,
        on_lost: Callable[[], None] | None = None,
        on_regained: Callable[[], None] | None = None,
    ) -> None:
        self._lease = lease
        self._heartbeat_s = heartbeat_s
        self._on_lost = on_lost
        self._on_regained = on_regained
        self._renew_now = asyncio.Event()
        self._run_id = ""
        self._renewed_at = 0.0
        self._closed = False
        self._idle = asyncio.Lock()
        self.held = False

    async def acquire(self) -> None:
        """Takes the lease. Raises `PhloemError` when Redis is away or the lease is refused."""
        async with self._idle:
            renewal = await self._lease.renew()
            self._run_id, self._renewed_at, self.held = renewal.run_id, time.monotonic(), True

    def renew_soon(self) -> None:
        """The record changed (draining, say): renew now instead of at the next heartbeat."""
        self._renew_now.set()

    async def run(self) -> None:
        """Renews until `close`. Raises `PhloemError` that is not retryable when the lease is refused for good
        (`stale_epoch`, `device_taken`): the process has been replaced and must end."""
        while not self._closed:
            await self._wait_for_heartbeat()
            async with self._idle:
                if not self._closed:
                    await self._beat()

    async def close(self) -> None:
        """Ends `run` and gives the lease back; when Redis is away it runs out by itself."""
        self._closed = True
        self._renew_now.set()
        async with self._idle:
            self.held = False
            try:
                await self._lease.release()
            except PhloemError as error:
                log.warning("lease not given back, it runs out by itself: %s", error)

    async def _wait_for_heartbeat(self) -> None:
        try:
            async with asyncio.timeout(self._heartbeat_s):
                await self._renew_now.wait()
        except TimeoutError:
            pass
        self._renew_now.clear()

    async def _beat(self) -> None:
        try:
            renewal = await self._lease.renew()
        except PhloemError as error:
            if not error.retryable:
                self._lose(str(error))
                raise
            if time.monotonic() - self._renewed_at >= self._lease.ttl_s:
                self._lose(str(error))
            return
        self._renewed_at = time.monotonic()
        if not renewal.held:
            self._lose("the lease was missing")
        elif renewal.run_id != self._run_id:
            self._lose("Redis restarted")
        self._run_id = renewal.run_id
        self._regain()

    def _lose(self, reason: str) -> None:
        if self.held:
            self.held = False
            log.warning("lease lost: %s", reason)
            if self._on_lost is not None:
                self._on_lost()

    def _regain(self) -> None:
        if not self.held:
            self.held = True
            log.info("lease held again")
            if self._on_regained is not None:
                self._on_regained()
