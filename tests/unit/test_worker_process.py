"""A front as a real process: signals, exit codes, and an engine that can't outlive it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil

from phloem.shared.discovery.registry import Registry
from phloem.shared.lifecycle.child_process import ChildProcess, spawn_child
from phloem.shared.protocol.cluster import WorkerRecord
from tests.support.valkey import ValkeyServer
from tests.support.waiting import until

REPOSITORY = Path(__file__).parents[2]


@asynccontextmanager
async def worker_process(
    valkey: ValkeyServer, model_dir: Path, registry: Registry
) -> AsyncIterator[tuple[ChildProcess, WorkerRecord]]:
    """A registered worker, killed at the end when it still runs."""
    argv = [sys.executable, "-m", "tests.support.worker_process", valkey.url, str(model_dir), "w1"]
    child = await spawn_child("worker", argv, cwd=str(REPOSITORY), stderr=asyncio.subprocess.DEVNULL)
    try:
        async with asyncio.timeout(20):
            async for snapshot in registry.watch():
                record = snapshot.worker("w1")
                if record is not None:
                    yield child, record
                    return
                assert child.returncode is None
    finally:
        child.kill()
        await child.wait()


def engine_of(child: ChildProcess) -> psutil.Process:
    (engine,) = psutil.Process(child.pid).children()
    return engine


async def test_sigterm_deregisters_and_exits_with_0(
    valkey: ValkeyServer, tmp_path: Path, registry: Registry
) -> None:
    async with worker_process(valkey, tmp_path, registry) as (child, _):
        engine = engine_of(child)
        child.terminate()
        async with asyncio.timeout(10):
            assert await child.wait() == 0
        assert (await registry.read()).workers == {}
        assert not engine.is_running()


async def test_engine_dies_with_a_killed_front(
    valkey: ValkeyServer, tmp_path: Path, registry: Registry
) -> None:
    async with worker_process(valkey, tmp_path, registry) as (child, _):
        engine = engine_of(child)
        os.kill(child.pid, signal.SIGKILL)
        await until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, 5.0)


async def test_front_of_a_killed_engine_exits_with_1(
    valkey: ValkeyServer, tmp_path: Path, registry: Registry
) -> None:
    async with worker_process(valkey, tmp_path, registry) as (child, _):
        engine_of(child).kill()
        async with asyncio.timeout(10):
            assert await child.wait() == 1
        assert (await registry.read()).workers == {}
