"""Fixtures of the unit tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from phloem.shared.discovery.registry import Registry
from tests.support.gateway import REPLY, FakeGenerator, encode, make_model_dir, reply_script
from tests.support.valkey import ValkeyServer, running_valkey


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
