"""How many engines start while others are lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest

from phloem.shared.engine.config import EngineOptions
from phloem.shared.transfer_bench.engine_client import EngineClient
from phloem.shared.transfer_bench.lab import STARTS_AT_ONCE, Lab
from phloem.shared.transfer_bench.loss_peers import STARTS_BESIDE_LOSSES, PeerPlan, Peers

NUM_AHEAD = 10
PLAN = PeerPlan(role="prefill", gpu=None, staging=((65_536, 1),), num_ahead=NUM_AHEAD)


class PatientLab(Lab):
    """Its engines start when the test says so."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.starting: list[asyncio.Future[EngineClient]] = []

    async def start(self, *_: object, **__: object) -> EngineClient:
        self.num_started += 1
        self.starting.append(asyncio.get_running_loop().create_future())
        return await self.starting[-1]

    async def let_start(self, count: int) -> None:
        """The `count` oldest of those that are starting."""
        await settle()
        for _ in range(count):
            self.starting.pop(0).set_result(cast(EngineClient, object()))
        await settle()


async def settle() -> None:
    """Every task has gone as far as it can: none of them waits for more than the one before."""
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.fixture
async def lab(tmp_path: Path) -> PatientLab:
    return PatientLab(EngineOptions(), tmp_path)


@pytest.fixture
async def peers(lab: PatientLab) -> AsyncIterator[Peers]:
    peers = Peers(lab, PLAN)
    yield peers
    await peers.close()


async def test_all_start_before_the_losses(lab: PatientLab, peers: Peers) -> None:
    peers.start_ahead(100, 100)
    assert peers.num_starting == NUM_AHEAD
    await lab.let_start(NUM_AHEAD)
    assert peers.num_starting == 0 and lab.num_started == NUM_AHEAD


async def test_few_start_beside_losses(lab: PatientLab, peers: Peers) -> None:
    peers.start_ahead(100, 100)
    await lab.let_start(NUM_AHEAD)
    for _ in range(NUM_AHEAD):
        await peers.take(100)
        await settle()
        assert len(lab.starting) == min(lab.num_started - NUM_AHEAD, STARTS_BESIDE_LOSSES) > 0
    await lab.let_start(STARTS_BESIDE_LOSSES)
    await peers.take(100)
    await settle()
    assert len(lab.starting) == STARTS_BESIDE_LOSSES, "in the place of those that run"


async def test_run_that_must_wait_goes_on_when_several_are_there(lab: PatientLab, peers: Peers) -> None:
    taking = asyncio.create_task(peers.take(100))
    await lab.let_start(STARTS_AT_ONCE - 1)
    assert len(lab.starting) == 1 and not taking.done(), "it would be lost beside a start"
    await lab.let_start(1)
    await taking
    await settle()
    assert len(lab.starting) == STARTS_BESIDE_LOSSES


async def test_no_more_start_than_are_wanted(lab: PatientLab, peers: Peers) -> None:
    peers.start_ahead(3, 100)
    await lab.let_start(3)
    await peers.take(1)
    await settle()
    assert lab.num_started == 3 and not lab.starting
    await peers.take(0)
    await peers.take(0)
    await settle()
    assert lab.num_started == 3 and not lab.starting


async def test_peers_of_a_later_run_start_one_by_one(lab: PatientLab, peers: Peers) -> None:
    for num_processes in range(1, 6):
        peers.start_ahead(num_processes, 1)
        await settle()
        assert len(lab.starting) == 1
        peers.start_ahead(num_processes + 1, 0)
        peers.start_ahead(num_processes + 1, -1)
        await lab.let_start(1)
    assert lab.num_started == 5
