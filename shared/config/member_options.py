"""The flags by which a service finds its cluster."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from phloem.shared.telemetry.logs import LogOptions


class MemberOptions(LogOptions, frozen=True, kw_only=True):
    """What every service has; its own configuration inherits it."""

    redis_url: Annotated[str, Meta(min_length=1, description="Redis or Valkey that the cluster shares")] = (
        "redis://127.0.0.1:6379/0"
    )
    redis_wait_s: Annotated[
        float, Meta(ge=0.0, le=3600.0, description="how long to wait for Redis at start")
    ] = 30.0
    cluster_secret: Annotated[
        str, Meta(description="secret that all services share; empty: the one kept in Redis")
    ] = ""
