"""Clusters of real processes, shared by the tests of a module where that is safe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import Cluster, running_cluster


@pytest.fixture(scope="module")
def pair(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One prefill and one decode worker; audited when the module is done."""
    with running_cluster(smollm2_dir, tmp_path_factory.mktemp("logs")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def square(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two prefill and two decode workers; audited when the module is done."""
    with running_cluster(smollm2_dir, tmp_path_factory.mktemp("logs"), prefill=2, decode=2) as cluster:
        yield cluster
