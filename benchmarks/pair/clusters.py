"""Clusters by `phloem up`, one after another."""

from __future__ import annotations

import asyncio
import socket
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from benchmarks.pair.tables import Table
from phloem.shared.errors import PhloemError
from phloem.shared.lifecycle.child_process import spawn_child

HOST = "127.0.0.1"
_START_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 60.0


@asynccontextmanager
async def cluster(table: Table, name: str, roles: Sequence[str], folder: Path) -> AsyncIterator[str]:
    """A cluster by `phloem up`; gives its URL. Raises `PhloemError` with the end of its log."""
    with socket.create_server((HOST, 0)) as probe:
        port = probe.getsockname()[1]
    run_dir, log = folder / name, folder / f"{name}.log"
    command = [sys.executable, "-m", "phloem.cli.main", "up", "--no-ask", "--port", str(port), *roles]
    command += ["--model-path", table.model, *table.up_flags, "--run-dir", str(run_dir)]
    began_s = time.monotonic()
    with log.open("wb") as file:
        child = await spawn_child(name, command, stdout=file.fileno(), stderr=file.fileno())
    url = f"http://{HOST}:{port}"
    try:
        while not await asyncio.to_thread(answers, f"{url}/health_generate"):
            if child.returncode is not None or time.monotonic() - began_s > _START_TIMEOUT_S:
                raise PhloemError("bench_failed", f"{name} does not start:\n{tails(folder, name)}")
            await asyncio.sleep(0.1)
        print(f"{name}: ready after {time.monotonic() - began_s:.1f} s", flush=True)
        yield url
    except PhloemError:
        print(tails(folder, name))
        raise
    finally:
        await child.stop(_STOP_TIMEOUT_S)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def tails(folder: Path, name: str) -> str:
    """The last lines of every log of a cluster that are more than information."""
    parts = []
    for path in [folder / f"{name}.log", *sorted((folder / name).glob("*.log"))]:
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        parts += [f"== {path.name}", *[line for line in lines if " info " not in line][-6:]]
    return "\n".join(parts)
