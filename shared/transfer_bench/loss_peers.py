"""The peers that a run of losses uses up: processes start ahead, channels are opened in turn."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import msgspec

from phloem.shared.protocol.cluster import Role
from phloem.shared.transfer_bench.engine_client import EngineClient
from phloem.shared.transfer_bench.lab import Lab


class PeerPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What the peers are: `staging` are (bytes, slots) of those to be lost, in turn; small ones make a
    transfer last. `num_ahead` processes are starting or waiting at a time."""

    role: Role
    gpu: int | None
    staging: tuple[tuple[int, int], ...]
    num_ahead: int


class Peers:
    """Starts peers of one plan, in order. None of them has a channel yet."""

    def __init__(self, lab: Lab, plan: PeerPlan) -> None:
        self._lab = lab
        self._plan = plan
        self._starting: list[asyncio.Task[EngineClient]] = []
        self._num_small = 0

    async def start_ordinary(self) -> EngineClient:
        """A peer with the staging slots of the lab's options."""
        return await self._start({})

    def start_ahead(self, wanted: int) -> None:
        """Lets `wanted` peers, or as many as may be, be under way."""
        while len(self._starting) < min(wanted, self._plan.num_ahead):
            num_bytes, slots = self._plan.staging[self._num_small % len(self._plan.staging)]
            self._num_small += 1
            small = {"staging_bytes": num_bytes, "staging_slots": slots}
            self._starting.append(asyncio.create_task(self._start(small)))

    async def take(self, wanted_after: int) -> EngineClient:
        """The next peer once it runs; others are started in its place, up to `wanted_after`.

        Raises `PhloemError` when it did not start.
        """
        self.start_ahead(1)
        peer = await self._starting.pop(0)
        self.start_ahead(wanted_after)
        return peer

    async def close(self) -> None:
        """Gives up what is starting; what runs is the lab's."""
        for task in self._starting:
            task.cancel()
        await asyncio.gather(*self._starting, return_exceptions=True)
        self._starting.clear()

    async def _start(self, staging: Mapping[str, int]) -> EngineClient:
        # A peer does a handful of steps in its life: capturing them would take longer.
        changes = {**staging, "disable_cuda_graph": True}
        return await self._lab.start(self._plan.role, self._plan.gpu, changes=changes)
