"""A whole cluster of real processes, as an operator would start it with `phloem serve`.

Each process is a `phloem serve ...` of its own over a real Valkey, with a free loopback port, its log in a
file, and a parent-death signal, so that a killed test run leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import psutil
from openai import OpenAI

from phloem.shared.discovery.registry import Registry
from phloem.shared.protocol.cluster import WorkerRecord
from phloem.shared.protocol.engine import AuditReply
from phloem.shared.protocol.worker_rpc import WORKER_SERVICE, AuditCall, audit_call, audit_reply
from phloem.shared.rpc.client import RpcChannel
from tests.support.valkey import ValkeyServer, die_with_parent, free_port

SECRET = "secret of the test cluster"
START_TIMEOUT_S = 120.0
MODEL_NAME = "smollm2"


class Cluster:
    """Use as a context manager. Workers are named `prefill-0`, `decode-1`, ...; a restarted one keeps its
    name and gets a new epoch."""

    def __init__(
        self,
        model_dir: Path,
        log_dir: Path,
        *,
        worker_flags: tuple[str, ...] = (),
        gateway_flags: tuple[str, ...] = (),
    ) -> None:
        self._model_dir = model_dir
        self._log_dir = log_dir
        self._worker_flags = worker_flags
        self._more_gateway_flags = gateway_flags
        self._clients: list[OpenAI] = []
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.valkey = ValkeyServer(password="test password")
        self.port = free_port()

    def __enter__(self) -> Cluster:
        self.valkey.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes.values():
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.valkey.stop()
        for client in self._clients:
            client.close()

    # -- processes -------------------------------------------------------------------------------------

    def start(self, *, prefill: int = 0, decode: int = 0, unified: int = 0) -> Cluster:
        """Starts the index, the gateway and so many workers, and waits until all serve."""
        self.spawn("cache-index", "cache-index")
        self.spawn("gateway", "gateway", "--port", str(self.port), *self._gateway_flags())
        for role, count in (("prefill", prefill), ("decode", decode), ("unified", unified)):
            for index in range(count):
                self.spawn_worker(role, f"{role}-{index}")
        self.wait_for_workers({name for name in self.processes if "-" in name} - {"cache-index"})
        self.wait_until(self.is_ready, "the gateway is ready")
        return self

    def spawn_worker(self, role: str, name: str, *flags: str) -> None:
        """Starts a worker; it registers by itself."""
        named = ("--model-path", str(self._model_dir), "--worker-id", name)
        self.spawn(name, role, *named, *self._worker_flags, *flags)

    def spawn(self, name: str, service: str, *flags: str) -> None:
        env = {
            **os.environ,
            "PHLOEM_REDIS_URL": self.valkey.url,
            "PHLOEM_CLUSTER_SECRET": SECRET,
        }
        command = [sys.executable, "-m", "phloem.cli.main", "serve", service, *flags]
        with (self._log_dir / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, stdout=log, stderr=log, env=env, preexec_fn=die_with_parent
            )

    def signal(self, name: str, number: signal.Signals) -> None:
        self.processes[name].send_signal(number)

    def kill_worker(self, name: str) -> None:
        """SIGKILL of the front; its engine dies with it."""
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def engine_pid(self, name: str) -> int:
        children = psutil.Process(self.processes[name].pid).children(recursive=True)
        return next(c.pid for c in children if "phloem.shared.engine.main" in " ".join(c.cmdline()))

    def all_pids(self) -> list[int]:
        """Every process of the cluster, engines included."""
        fronts = [process.pid for process in self.processes.values()]
        return fronts + [c.pid for pid in fronts for c in psutil.Process(pid).children(recursive=True)]

    def log(self, name: str) -> str:
        return (self._log_dir / f"{name}.log").read_text(errors="replace")

    def _gateway_flags(self) -> tuple[str, ...]:
        named = ("--model-path", str(self._model_dir), "--served-model-name", MODEL_NAME)
        return (*named, *self._more_gateway_flags)

    # -- waiting ---------------------------------------------------------------------------------------

    def wait_until(self, holds: Callable[[], bool], what: str, timeout_s: float = START_TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not holds():
            for name, process in self.processes.items():
                if process.poll() not in (None, 0):
                    raise AssertionError(
                        f"{name} exited with {process.returncode}:\n{self.log(name)[-3000:]}"
                    )
            assert time.monotonic() < deadline, f"not in {timeout_s} s: {what}"
            time.sleep(0.05)

    def wait_for_workers(self, names: set[str]) -> None:
        """Until exactly these workers are registered and ready."""

        def registered() -> bool:
            ready = {r.worker_id for r in self.workers() if r.state == "ready"}
            return ready == names

        self.wait_until(registered, f"workers {sorted(names)} are registered")

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health_generate", timeout=10) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    # -- talking to it ---------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def openai(self) -> OpenAI:
        """A client of its own for each caller; all are closed with the cluster."""
        client = OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)
        self._clients.append(client)
        return client

    def generate(self, prompt: str, max_tokens: int) -> str:
        """Greedy, and exactly `max_tokens` long."""
        answer = self.openai().completions.create(
            model=MODEL_NAME,
            prompt=prompt,
            temperature=0,
            max_tokens=max_tokens,
            extra_body={"ignore_eos": True},
        )
        return answer.choices[0].text

    def workers(self) -> list[WorkerRecord]:
        """Every worker whose lease lives."""

        async def read() -> list[WorkerRecord]:
            registry = Registry(self.valkey.url)
            try:
                await registry.connect(5.0)
                return list((await registry.read()).workers.values())
            finally:
                await registry.close()

        return asyncio.run(read())

    def worker(self, name: str) -> WorkerRecord:
        return next(record for record in self.workers() if record.worker_id == name)

    def audit(self, name: str) -> AuditReply:
        """The page audit and the counters of one worker."""
        record = self.worker(name)

        async def ask() -> AuditReply:
            channel = RpcChannel(record.rpc_address, SECRET.encode())
            try:
                call = channel.unary(WORKER_SERVICE, "Audit", audit_call, audit_reply)
                return await call(AuditCall(record.epoch), 10.0)
            finally:
                await channel.close()

        return asyncio.run(ask())

    def assert_audits_clean(self, timeout_s: float = 10.0) -> None:
        """Every registered worker is idle soon, and each of its pages has exactly one owner."""
        for record in self.workers():
            name = record.worker_id
            self.wait_until(lambda n=name: self.audit(n).num_requests == 0, f"{name} is idle", timeout_s)  # type: ignore[misc]
            reply = self.audit(name)
            assert reply.problems == []
            assert reply.locked_nodes == 0 and reply.request_pages == 0
            assert reply.free_pages + reply.tree_pages == reply.total_pages

    def metric(self, worker: str, name: str) -> float:
        """The sum of a metric over its labels, from the worker's metrics page."""
        ports = re.findall(r"metrics_port=(\d+)", self.log(worker))
        assert ports, f"{worker} is not ready"
        url = f"http://127.0.0.1:{ports[-1]}/metrics"
        with urllib.request.urlopen(url, timeout=10) as response:
            lines = response.read().decode().splitlines()
        samples = [line for line in lines if line.split("{")[0].split(" ")[0] == name]
        assert samples, f"{worker} has no metric {name}"
        return sum(float(line.rsplit(" ", 1)[1]) for line in samples)

    def counters(self, name: str) -> dict[str, int]:
        return self.audit(name).counters


@contextmanager
def running_cluster(
    model_dir: Path,
    log_dir: Path,
    *,
    prefill: int = 1,
    decode: int = 1,
    unified: int = 0,
    worker_flags: tuple[str, ...] = (),
    gateway_flags: tuple[str, ...] = (),
) -> Iterator[Cluster]:
    """A started cluster; its pages are audited when the block ends well."""
    with Cluster(model_dir, log_dir, worker_flags=worker_flags, gateway_flags=gateway_flags) as cluster:
        cluster.start(prefill=prefill, decode=decode, unified=unified)
        yield cluster
        cluster.assert_audits_clean()
