"""Fixtures of the unit tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from litestar.types import ASGIApp

from phloem.services.gateway.app import create_app
from phloem.services.gateway.cluster.client import ClusterClient
from phloem.services.gateway.gateway import Gateway
from phloem.shared.discovery.registry import Registry
from phloem.shared.protocol.cluster import Role
from tests.support.cluster_client import NewWorker, running_client
from tests.support.fake_worker import FakeWorker, fake_worker
from tests.support.gateway import (
    REPLY,
    FakeGenerator,
    encode,
    in_process,
    make_gateway,
    make_model_dir,
    reply_script,
)
from tests.support.gateway import SECRET as GATEWAY_SECRET
from tests.support.gateway_errors import bounded_gateway
from tests.support.valkey import ValkeyServer, running_valkey
from tests.support.waiting import until
from tests.support.worker_front import SECRET


@pytest.fixture
def valkey() -> Iterator[ValkeyServer]:
    """A real, empty Valkey of the test's own, which it may stop, pause and start again."""
    with running_valkey() as server:
        yield server


@pytest.fixture
async def registry(valkey: ValkeyServer) -> AsyncIterator[Registry]:
    """A registry whose leases run out after 0.6 s."""
    registry = Registry(valkey.url, timeout_s=0.5, lease_ttl_s=0.6, poll_interval_s=0.1)
    yield registry
    await registry.close()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with its chat template, as gateways load it."""
    return make_model_dir(tmp_path_factory.mktemp("model"))


@pytest.fixture
def generator(model_dir: Path) -> FakeGenerator:
    """In place of a cluster: answers `REPLY` to everything."""
    return FakeGenerator(reply_script(encode(model_dir, REPLY)))


@pytest.fixture
async def raw(model_dir: Path, generator: FakeGenerator) -> AsyncIterator[httpx.AsyncClient]:
    """Plain HTTP to a gateway of its own in front of `generator`."""
    async with in_process(make_gateway(model_dir, generator)) as client:
        yield client


@pytest.fixture(scope="session")
def bounded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Gateway, ASGIApp]:
    """A gateway with low limits and its application, made once."""
    gateway = bounded_gateway(make_model_dir(tmp_path_factory.mktemp("model")))
    return gateway, create_app(gateway, GATEWAY_SECRET, on_loopback=True)


@pytest.fixture
async def bounded_client(
    bounded: tuple[Gateway, ASGIApp], generator: FakeGenerator
) -> AsyncIterator[httpx.AsyncClient]:
    """Of the gateway with low limits, in front of `generator`."""
    gateway, app = bounded
    gateway.generator = generator
    async with in_process(gateway, app) as client:
        yield client


@pytest.fixture
async def client(registry: Registry) -> AsyncIterator[ClusterClient]:
    """A gateway's client of the cluster; idle again when the test is over."""
    async with running_client(registry) as client:
        yield client


@pytest.fixture
def new_worker(registry: Registry, client: ClusterClient) -> NewWorker:
    """Starts a worker and waits until the client has its session."""

    @asynccontextmanager
    async def start(worker_id: str, role: Role) -> AsyncIterator[FakeWorker]:
        async with fake_worker(registry, worker_id, role, SECRET.encode()) as worker:
            await until(lambda: worker.ref in client.workers())
            yield worker

    return start
