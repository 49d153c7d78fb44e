"""How gateways learn of workers' loads: heartbeats that they poll, and word over the sessions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

from phloem.simulate.events import EventQueue
from phloem.simulate.gateway import SimGateway
from phloem.simulate.options import Delays
from phloem.simulate.worker import SimWorker


class LoadNews:
    """Stands for the registry in Redis and for every worker's `LoadTeller`."""

    def __init__(
        self,
        events: EventQueue,
        delays: Delays,
        workers: Sequence[SimWorker],
        gateways: Sequence[SimGateway],
    ) -> None:
        self._events = events
        self._delays = delays
        self._workers = workers
        self._gateways = gateways
        self._registry = [worker.record() for worker in workers]
        self._pausing: set[int] = set()  # workers that told their load less than `tell_s` ago
        self._to_tell: set[int] = set()  # those of them whose load has changed since

    def start(self, rng: random.Random) -> None:
        """Heartbeats and polls begin at random phases and never end."""
        for worker in self._workers:
            self._events.after(rng.random() * self._delays.heartbeat_s, partial(self._beat, worker))
        for gateway in self._gateways:
            gateway.poll(self._registry)
            self._events.after(rng.random() * self._delays.poll_s, partial(self._poll, gateway))

    def on_load(self, worker: SimWorker) -> None:
        """The worker's load has changed: tells it at once, then at most every `tell_s` with the latest."""
        if self._delays.tell_s <= 0:
            return
        if worker.slot in self._pausing:
            self._to_tell.add(worker.slot)
            return
        self._pausing.add(worker.slot)
        self._events.after(self._delays.tell_s, partial(self._tell_again, worker))
        load = worker.record().load
        for gateway in self._gateways:
            self._events.after(self._delays.hop_s, partial(gateway.heard, worker.slot, load))

    def _beat(self, worker: SimWorker) -> None:
        self._registry[worker.slot] = worker.record()
        self._events.after(self._delays.heartbeat_s, partial(self._beat, worker))

    def _poll(self, gateway: SimGateway) -> None:
        gateway.poll(self._registry)
        self._events.after(self._delays.poll_s, partial(self._poll, gateway))

    def _tell_again(self, worker: SimWorker) -> None:
        self._pausing.remove(worker.slot)
        if worker.slot in self._to_tell:
            self._to_tell.remove(worker.slot)
            self.on_load(worker)
