"""The flags of a worker."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from phloem.shared.config.member_options import MemberOptions
from phloem.shared.engine.config import EngineOptions


class WorkerConfig(MemberOptions, frozen=True, kw_only=True):
    """One worker: its front's flags and, in `engine`, its engine's; all are flags of one level."""

    host: Annotated[str, Meta(description="address that every socket of the worker binds to")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="gRPC port; 0: a free one")] = 0
    metrics_port: Annotated[
        int, Meta(ge=0, le=65535, description="port of /metrics and /health; 0: a free one")
    ] = 0
    advertise_host: Annotated[
        str, Meta(description="address that peers reach this worker at; empty: the --host")
    ] = ""
    worker_id: Annotated[
        str,
        Meta(
            max_length=128,
            pattern=r"^[A-Za-z0-9._-]*$",
            description="name of the worker; empty: random",
        ),
    ] = ""
    drain_timeout_s: Annotated[
        float, Meta(ge=0.0, le=86_400.0, description="after SIGTERM, longest wait for requests to end")
    ] = 60.0
    session_queue_messages: Annotated[
        int,
        Meta(ge=1, le=1_000_000, description="a gateway that is so far behind loses its session"),
    ] = 1024
    inbox_messages: Annotated[
        int, Meta(ge=1, le=1_000_000, description="messages that may wait for the engine before 503")
    ] = 8192
    engine_start_timeout_s: Annotated[
        float, Meta(gt=0.0, le=86_400.0, description="longest wait for the engine to load and warm up")
    ] = 1800.0
    engine_hang_timeout_s: Annotated[
        float,
        Meta(gt=0.0, le=86_400.0, description="one step, or silence of a busy engine, that ends the worker"),
    ] = 120.0
    engine: EngineOptions = EngineOptions()

    def __post_init__(self) -> None:
        if self.host in ("0.0.0.0", "::", ""):
            raise ValueError(
                f"--host {self.host!r} is no address that peers can reach: name one, or auto-private"
            )
