"""The flags of `phloem up`: how many of each process, and the engine's flags for all workers."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from phloem.shared.engine.config import EngineOptions
from phloem.shared.telemetry.logs import LogLevel


class UpConfig(Struct, frozen=True, kw_only=True):
    """What to start. Flags of the engine go to every worker; [gateway], [prefill], ... of phloem.toml and
    `PHLOEM_GATEWAY_*`, ... still reach their services."""

    prefill: Annotated[int, Meta(ge=0, le=64, description="prefill workers")] = 1
    decode: Annotated[int, Meta(ge=0, le=64, description="decode workers")] = 1
    unified: Annotated[
        int, Meta(ge=0, le=64, description="unified workers; with --prefill 0 --decode 0 the whole cluster")
    ] = 0
    gateways: Annotated[int, Meta(ge=1, le=16, description="gateways, on consecutive ports")] = 1
    host: Annotated[str, Meta(min_length=1, description="address that all services bind to")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=1, le=65535, description="HTTP port of the first gateway")] = 30000
    redis_url: Annotated[
        str, Meta(description="a Redis or Valkey to use; empty: start a Valkey of our own")
    ] = ""
    cluster_secret: Annotated[
        str, Meta(description="secret that all services share; empty: the one kept in Redis")
    ] = ""
    run_dir: Annotated[
        str, Meta(description="folder for logs; empty: a new one under the temporary folder")
    ] = ""
    start_timeout_s: Annotated[
        float, Meta(gt=0.0, le=86_400.0, description="longest wait for the cluster to be ready")
    ] = 1800.0
    stop_timeout_s: Annotated[
        float, Meta(gt=0.0, le=3600.0, description="longest wait for each kind of process to stop")
    ] = 10.0
    hang_timeout_s: Annotated[
        float,
        Meta(
            ge=0.0,
            le=86_400.0,
            description="a service that runs but has not renewed its registration for so long is killed and "
            "started again; 0: never",
        ),
    ] = 30.0
    log_level: Annotated[LogLevel, Meta(description="least severity that services log")] = "info"
    ask: Annotated[bool, Meta(description="ask the cluster a question when it is ready")] = True
    once: Annotated[bool, Meta(description="stop after the first answer; exit 0 if there was one")] = False
    engine: EngineOptions = EngineOptions()

    def __post_init__(self) -> None:
        if not self.unified and not (self.prefill and self.decode):
            raise ValueError(
                "a cluster needs --prefill and --decode of at least 1 each, or --unified of at least 1"
            )
        if self.port + self.gateways - 1 > 65535:
            raise ValueError(f"--port {self.port} leaves no room for --gateways {self.gateways}")

    @property
    def gateway_ports(self) -> tuple[int, ...]:
        return tuple(range(self.port, self.port + self.gateways))
