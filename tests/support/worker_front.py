"""A real front over a fake engine, in the test's own process."""

from __future__ import annotations

import asyncio
import sys
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from phloem.shared.discovery.registry import Registry
from phloem.shared.engine.config import EngineOptions
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.cluster import Role, WorkerRecord
from phloem.shared.protocol.engine import AuditReply
from phloem.shared.protocol.session import SessionDown, SessionUp, session_down, session_up
from phloem.shared.protocol.worker_rpc import (
    WORKER_SERVICE,
    AuditCall,
    DrainRequest,
    FlushRequest,
    audit_call,
    audit_reply,
    done,
    drain_request,
    flush_request,
)
from phloem.shared.rpc.client import RpcChannel, RpcStream
from phloem.shared.worker.config import WorkerConfig
from phloem.shared.worker.front import run_worker
from tests.support import fake_engine
from tests.support.valkey import free_port

SECRET = "test secret"
START_TIMEOUT_S = 15.0


class Front:
    """A running front as its peers see it."""

    def __init__(self, task: asyncio.Task[None], record: WorkerRecord, metrics_port: int) -> None:
        self.task = task
        self.record = record
        self.metrics_port = metrics_port
        self.channel = RpcChannel(record.rpc_address, SECRET.encode())

    def session(self) -> RpcStream[SessionDown, SessionUp]:
        return self.channel.stream(WORKER_SERVICE, "Session", session_down, session_up)

    async def audit(self) -> AuditReply:
        call = self.channel.unary(WORKER_SERVICE, "Audit", audit_call, audit_reply)
        return await call(AuditCall(self.record.epoch), 5.0)

    async def metrics(self) -> dict[str, float]:
        """What the front exports, by "name{labels}"."""
        return await asyncio.to_thread(_scrape, self.metrics_port)

    async def flush(self, epoch: int | None = None) -> None:
        call = self.channel.unary(WORKER_SERVICE, "Flush", flush_request, done)
        await call(FlushRequest(self.record.epoch if epoch is None else epoch), 5.0)

    async def drain(self) -> None:
        call = self.channel.unary(WORKER_SERVICE, "Drain", drain_request, done)
        await call(DrainRequest(self.record.epoch), 5.0)


def fake_engine_command(step_s: float = 0.002) -> tuple[str, ...]:
    return (sys.executable, fake_engine.__file__, "--step-s", str(step_s))


def worker_config(redis_url: str, model_dir: Path, worker_id: str) -> WorkerConfig:
    """`model_dir` becomes a directory that is a model as far as a front can tell."""
    (model_dir / "config.json").write_text("{}")
    return WorkerConfig(
        redis_url=redis_url,
        cluster_secret=SECRET,
        worker_id=worker_id,
        redis_wait_s=5.0,
        engine=EngineOptions(model_path=str(model_dir), load_format="dummy", num_threads=1),
    )


async def find_worker(registry: Registry, worker_id: str, task: asyncio.Task[None]) -> WorkerRecord:
    """The record of the worker once it is registered; raises what ended `task` before that."""
    async with asyncio.timeout(START_TIMEOUT_S):
        async for snapshot in registry.watch():
            record = snapshot.worker(worker_id)
            if record is not None:
                return record
            if task.done():
                task.result()
                raise AssertionError("the front ended before it registered")
    raise AssertionError("watch never ends")


@asynccontextmanager
async def running_front(
    redis_url: str,
    model_dir: Path,
    role: Role = "unified",
    *,
    worker_id: str = "w1",
    step_s: float = 0.002,
    engine_command: Sequence[str] = (),
    change: Callable[[WorkerConfig], WorkerConfig] = lambda config: config,
) -> AsyncIterator[Front]:
    """A front that has registered, over a fake engine unless `engine_command` says else; it is cancelled at
    the end when it still runs."""
    metrics_port = free_port()
    config = change(replaced(metrics_port=metrics_port)(worker_config(redis_url, model_dir, worker_id)))
    command = engine_command or fake_engine_command(step_s)
    task = asyncio.create_task(run_worker(config, role, engine_command=command))
    registry = Registry(redis_url)
    try:
        front = Front(task, await find_worker(registry, worker_id, task), metrics_port)
        yield front
        await front.channel.close()
    finally:
        await registry.close()
        if not task.done():
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def raises_code(call: Awaitable[object]) -> str:
    """The code of the `PhloemError` that `call` raises."""
    try:
        await call
    except PhloemError as error:
        return error.code
    raise AssertionError("no PhloemError was raised")


def replaced(
    *, engine: Mapping[str, object] | None = None, **changes: object
) -> Callable[[WorkerConfig], WorkerConfig]:
    """A change of the configuration, for `running_front`."""

    def change(config: WorkerConfig) -> WorkerConfig:
        options = msgspec.structs.replace(config.engine, **(engine or {}))
        return msgspec.structs.replace(config, engine=options, **changes)

    return change


def _scrape(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}
