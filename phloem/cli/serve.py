"""`phloem serve NAME`: one service in the foreground, as a container runs it."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from phloem.cli.flags import struct_command
from phloem.cli.services import SERVICES, ServiceSpec
from phloem.shared.config.bind_host import resolve_host
from phloem.shared.telemetry.logs import LogOptions


def __getattr__(name: str) -> Callable[..., int]:
    """`gateway`, `cache_index`, ...: the command of that service, whose configuration is imported now."""
    spec = next((spec for spec in SERVICES if spec.name.replace("-", "_") == name), None)
    if spec is None:
        raise AttributeError(name)
    return struct_command(
        spec.load_struct(), spec.name, spec.summary, lambda config, _: run_spec(spec, config)
    )


def run_spec(spec: ServiceSpec, config: msgspec.Struct) -> int:
    """Runs the service until it is told to stop; returns the exit code."""
    from phloem.shared.lifecycle.service import run_service

    resolved = with_bound_host(config)

    async def main() -> None:
        await spec.load_run()(resolved)

    return run_service(main, service=spec.name, logs=log_options(config))


def log_options(config: msgspec.Struct) -> LogOptions:
    """The logging flags among the service's own."""
    names = [field.name for field in msgspec.structs.fields(LogOptions)]
    return LogOptions(**{name: getattr(config, name) for name in names if hasattr(config, name)})


def with_bound_host(config: msgspec.Struct) -> msgspec.Struct:
    """The configuration with an address for `--host auto-private` and the like."""
    host = getattr(config, "host", None)
    return msgspec.structs.replace(config, host=resolve_host(host)) if isinstance(host, str) else config
