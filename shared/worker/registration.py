"""This worker's record in Redis: who it is, what it can take, and how busy it is."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from phloem.shared.discovery.lease import LeaseKeeper, WorkerLease
from phloem.shared.discovery.registry import Registry
from phloem.shared.protocol.cluster import WorkerLoad, WorkerRecord


class Registration:
    """Holds the worker's lease; every heartbeat carries the record as it is then.

    `on_regained` is called after a loss (Redis restarted, or could not be reached for too long): what else
    this worker keeps in Redis must be published anew.
    """

    def __init__(self, registry: Registry, record: WorkerRecord, on_regained: Callable[[], None]) -> None:
        self._record = record
        self._keeper = LeaseKeeper(WorkerLease(registry, lambda: self._record), on_regained=on_regained)

    @property
    def record(self) -> WorkerRecord:
        return self._record

    def set_load(self, load: WorkerLoad) -> None:
        """Carried by the next heartbeat."""
        self._record = msgspec.structs.replace(self._record, load=load)

    def set_draining(self) -> None:
        """Asks gateways, at once, to route nothing here any more."""
        self._record = msgspec.structs.replace(self._record, state="draining")
        self._keeper.renew_soon()

    async def acquire(self) -> None:
        """Registers. Raises `PhloemError` when Redis is away or another worker has the name."""
        await self._keeper.acquire()

    async def run(self) -> None:
        """Heartbeats until `close`. Raises `PhloemError` (`stale_epoch`) when replaced."""
        await self._keeper.run()

    async def close(self) -> None:
        """Deregisters."""
        await self._keeper.close()
