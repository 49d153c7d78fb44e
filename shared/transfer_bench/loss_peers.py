"""The peers that a run of losses uses up: processes start ahead, channels are opened in turn.

Where engines start, NCCL's calls take seconds instead of tenths. So few start beside losses, one for one that
was taken. When none is left, several start at once, and the run goes on when all of these are there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import msgspec

from phloem.shared.protocol.cluster import Role
from phloem.shared.transfer_bench.engine_client import EngineClient
from phloem.shared.transfer_bench.lab import STARTS_AT_ONCE, Lab

STARTS_BESIDE_LOSSES = 2


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

    @property
    def num_starting(self) -> int:
        """Processes that don't run yet."""
        return sum(not task.done() for task in self._starting)

    def start_ahead(self, wanted: int, at_once: int) -> None:
        """Lets `wanted` peers, or as many as may be, be under way, if no more than `at_once` of them have to
        start at a time."""
        num_missing = min(wanted, self._plan.num_ahead) - len(self._starting)
        for _ in range(min(num_missing, at_once - self.num_starting)):
            num_bytes, slots = self._plan.staging[self._num_small % len(self._plan.staging)]
            self._num_small += 1
            small = {"staging_bytes": num_bytes, "staging_slots": slots}
            self._starting.append(asyncio.create_task(self._start(small)))

    async def take(self, wanted_after: int) -> EngineClient:
        """The next peer once it runs; others are started in its place, up to `wanted_after`. Is it not there
        yet, all that are starting are waited for. A loss that was begun is noticed beside them.

        Raises `PhloemError` when it did not start.
        """
        if not self._starting or not self._starting[0].done():
            self.start_ahead(wanted_after + 1, STARTS_AT_ONCE)
            await asyncio.wait(self._starting)
        peer = await self._starting.pop(0)
        self.start_ahead(wanted_after, STARTS_BESIDE_LOSSES)
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
