"""Waits until every process serves: workers and the index by their leases, gateways by HTTP."""

from __future__ import annotations

import asyncio

from phloem.cli.chat_client import ChatClient
from phloem.cli.up.child_log import stage_in
from phloem.cli.up.display import Display
from phloem.cli.up.plan import WORKER_KINDS, ChildSpec
from phloem.cli.up.supervisor import Child, Supervisor
from phloem.shared.discovery.registry import Registry
from phloem.shared.discovery.snapshot import ClusterSnapshot
from phloem.shared.host_port import host_port
from phloem.shared.protocol.cluster import ServiceRecord, WorkerRecord

_POLL_S = 0.1
_HEALTH_TIMEOUT_S = 2.0


async def wait_until_ready(
    supervisor: Supervisor, specs: list[ChildSpec], registry: Registry, host: str, display: Display
) -> ClusterSnapshot:
    """Returns the registry's view once all `specs` are ready, reporting each; a deadline is the caller's."""
    children = [supervisor.children[spec.name] for spec in specs]
    snapshot = ClusterSnapshot()
    waiting = list(children)
    watcher = registry.watch()
    try:
        async for snapshot in watcher:
            for child in children:
                show_stages(child, display)
            ready = [child for child in waiting if await _is_ready(child, snapshot, host)]
            for child in ready:
                display.ready(child.name)
            waiting = [child for child in waiting if child not in ready]
            if not waiting:
                break
            await asyncio.sleep(_POLL_S)
    finally:
        await watcher.aclose()
    return snapshot


def show_stages(child: Child, display: Display) -> None:
    """Passes on what the child's log says of its start since the last call."""
    stages = [stage for line in child.log.new_lines() if (stage := stage_in(line)) is not None]
    if stages:
        display.stage(child.name, stages[-1])


async def _is_ready(child: Child, snapshot: ClusterSnapshot, host: str) -> bool:
    kind = child.spec.kind
    if kind in WORKER_KINDS:
        return worker_record(child.spec, snapshot) is not None
    if kind == "cache-index":
        return index_record(child.spec, snapshot) is not None
    client = ChatClient(gateway_url(host, child.spec), timeout_s=_HEALTH_TIMEOUT_S)
    return await asyncio.to_thread(client.is_healthy)


def worker_record(spec: ChildSpec, snapshot: ClusterSnapshot) -> WorkerRecord | None:
    """What the worker of this spec has registered."""
    return snapshot.worker(_flag(spec, "--worker-id"))


def index_record(spec: ChildSpec, snapshot: ClusterSnapshot) -> ServiceRecord | None:
    """What the index of this spec has registered."""
    return _service_record("cache_index", _flag(spec, "--service-id"), snapshot)


def is_registered(spec: ChildSpec, snapshot: ClusterSnapshot) -> bool:
    """Whether the service of this spec holds its lease."""
    if spec.kind in WORKER_KINDS:
        return worker_record(spec, snapshot) is not None
    if spec.kind == "cache-index":
        return index_record(spec, snapshot) is not None
    return _service_record("gateway", _flag(spec, "--gateway-id"), snapshot) is not None


def _service_record(kind: str, name: str, snapshot: ClusterSnapshot) -> ServiceRecord | None:
    services = (service for service in snapshot.services if service.kind == kind)
    return next((service for service in services if service.service_id == name), None)


def _flag(spec: ChildSpec, flag: str) -> str:
    return spec.argv[spec.argv.index(flag) + 1]


def gateway_url(host: str, spec: ChildSpec) -> str:
    """Where the gateway of this spec listens."""
    assert spec.port is not None
    return f"http://{host_port(host, spec.port)}"
