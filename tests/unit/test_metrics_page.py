"""docs/metrics.md names what the services export: all of it, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client import CollectorRegistry

from phloem.services.cache_index.metrics import IndexMetrics
from phloem.services.gateway.cluster.metrics import ClusterMetrics
from phloem.services.gateway.cluster.routing_metrics import RoutingMetrics
from phloem.services.gateway.metrics import GatewayMetrics
from phloem.shared.worker.metrics import WorkerMetrics

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
ROW = re.compile(r"^\| `(?P<name>\w+)(?:\{[^}]*\})?` \| (?P<kind>\w+) \|", re.MULTILINE)


def exported() -> set[tuple[str, str]]:
    """(name as Prometheus shows it, kind) of every metric but the process's own."""
    gateway = GatewayMetrics().registry
    ClusterMetrics(gateway)
    RoutingMetrics(gateway)
    workers, index = CollectorRegistry(), CollectorRegistry()
    WorkerMetrics(workers)
    IndexMetrics(index)
    return {
        (family.name + ("_total" if family.type == "counter" else ""), family.type)
        for registry in (gateway, workers, index)
        for family in registry.collect()
        if family.name.startswith("phloem_") and family.type != "info"
    }


def test_every_metric_stands_on_the_page_with_its_kind() -> None:
    shown = [(row["name"], row["kind"]) for row in ROW.finditer(PAGE.read_text())]
    assert len(shown) == len(set(shown))
    assert set(shown) == exported()
