"""Which services there are, and where their configuration and entry live; they are imported on demand."""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable
from typing import NamedTuple, cast

import msgspec


class ServiceSpec(NamedTuple):
    """A service that `phloem serve NAME` runs; `name` is also its table in phloem.toml."""

    name: str
    summary: str
    config_module: str
    config_struct: str
    main_module: str

    def load_struct(self) -> type[msgspec.Struct]:
        """Imports the service's configuration struct (never torch)."""
        struct = getattr(importlib.import_module(self.config_module), self.config_struct)
        return cast(type[msgspec.Struct], struct)

    def load_run(self) -> Callable[[msgspec.Struct], Awaitable[None]]:
        """Imports the service itself: `async def run(config) -> None`."""
        run = importlib.import_module(self.main_module).run
        return cast(Callable[[msgspec.Struct], Awaitable[None]], run)


_WORKER_CONFIG = "phloem.shared.worker.config"

SERVICES: tuple[ServiceSpec, ...] = (
    ServiceSpec(
        "gateway",
        "The OpenAI-compatible HTTP server: tokenises, routes, streams.",
        "phloem.services.gateway.config",
        "GatewayConfig",
        "phloem.services.gateway.main",
    ),
    ServiceSpec(
        "prefill",
        "A worker that computes prompts and hands their KV pages over.",
        _WORKER_CONFIG,
        "WorkerConfig",
        "phloem.services.prefill.main",
    ),
    ServiceSpec(
        "decode",
        "A worker that receives KV pages and generates.",
        _WORKER_CONFIG,
        "WorkerConfig",
        "phloem.services.decode.main",
    ),
    ServiceSpec(
        "unified",
        "A worker that does both phases in one process.",
        _WORKER_CONFIG,
        "WorkerConfig",
        "phloem.services.unified.main",
    ),
    ServiceSpec(
        "cache-index",
        "The prefix index: which worker holds which prefix.",
        "phloem.services.cache_index.config",
        "CacheIndexConfig",
        "phloem.services.cache_index.main",
    ),
)

UP_SECTION = "up"


def all_sections() -> tuple[str, ...]:
    """The tables that phloem.toml may have."""
    return (*(spec.name for spec in SERVICES), UP_SECTION)
