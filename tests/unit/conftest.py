"""Fixtures of the unit tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from phloem.shared.discovery.registry import Registry
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
