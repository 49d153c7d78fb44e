"""Gateways hear of a worker's load as it changes, and not of every step."""

from __future__ import annotations

import asyncio

from phloem.shared.protocol.cluster import WorkerLoad
from phloem.shared.worker.load_teller import LoadTeller
from tests.support.waiting import until


async def test_a_change_is_told_at_once_and_the_latest_after_the_interval() -> None:
    told: list[WorkerLoad] = []
    teller = LoadTeller(told.append, interval_s=0.05)
    loads = [WorkerLoad(queued_tokens=count) for count in (100, 200, 300)]
    for load in loads:
        teller.note(load)
    assert told == loads[:1]
    await until(lambda: len(told) == 2)
    assert told == [loads[0], loads[2]]


async def test_what_routing_does_not_go_by_is_not_told() -> None:
    told: list[WorkerLoad] = []
    teller = LoadTeller(told.append, interval_s=0.001)
    teller.note(WorkerLoad(num_running=1, free_pages=10))
    teller.note(WorkerLoad(num_running=1, free_pages=9))
    await asyncio.sleep(0.01)
    teller.note(WorkerLoad(num_running=1, free_pages=8))
    assert [load.free_pages for load in told] == [10]


async def test_a_request_that_starts_to_run_changes_nothing() -> None:
    told: list[WorkerLoad] = []
    teller = LoadTeller(told.append, interval_s=0.0)
    teller.note(WorkerLoad(num_waiting=1))
    await asyncio.sleep(0)
    teller.note(WorkerLoad(num_running=1))
    teller.note(WorkerLoad(num_handing_over=1))
    assert len(told) == 1


async def test_a_peer_that_is_cut_off_is_told_at_once() -> None:
    told: list[WorkerLoad] = []
    teller = LoadTeller(told.append, interval_s=0.0)
    teller.note(WorkerLoad())
    await until(lambda: len(told) == 1)
    await asyncio.sleep(0)
    teller.note(WorkerLoad(cut_off=("decode-1",)))
    await until(lambda: len(told) == 2)
    assert told[1].cut_off == ("decode-1",)
