"""The process that a container runs: how fast it starts, how much it takes, how it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from phloem.shared.discovery.registry import Registry
from tests.support.valkey import ValkeyServer
from tests.support.waiting import until, until_async

MAX_START_CPU_S = 2.0  # its own time, so that a busy machine does not fail the test
MAX_RESIDENT_BYTES = 120 * 1024 * 1024


@pytest.fixture
def process(valkey: ValkeyServer) -> Iterator[psutil.Popen]:
    command = [sys.executable, "-m", "phloem.cli.main", "serve", "cache-index", "--redis-url", valkey.url]
    child = psutil.Popen(command, stderr=subprocess.DEVNULL)
    try:
        yield child
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()


async def test_process_starts_fast_small_without_torch_and_ends_on_sigterm(
    process: psutil.Popen, registry: Registry
) -> None:
    async def num_registered() -> int:
        return len((await registry.read()).services)

    await until_async(num_registered, timeout_s=30.0)
    times = process.cpu_times()
    assert times.user + times.system < MAX_START_CPU_S
    assert process.memory_info().rss <= MAX_RESIDENT_BYTES
    assert not [m.path for m in process.memory_maps() if "torch" in m.path or "numpy" in m.path]
    process.send_signal(signal.SIGTERM)
    await until(lambda: process.poll() is not None)
    assert process.returncode == 0
    assert await num_registered() == 0
