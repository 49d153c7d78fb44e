"""The flags of a cache_index replica."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from phloem.shared.config.member_options import MemberOptions


class CacheIndexConfig(MemberOptions, frozen=True, kw_only=True):
    """Everything a replica needs; replicas of one cluster may differ in it."""

    host: Annotated[str, Meta(min_length=1, description="address that every socket binds to")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="gRPC port; 0: a free one")] = 0
    metrics_port: Annotated[
        int, Meta(ge=0, le=65535, description="port of /metrics and /health; 0: a free one")
    ] = 0
    advertise_host: Annotated[
        str, Meta(description="address that peers reach this replica at; empty: the --host")
    ] = ""
    redis_connections: Annotated[
        int, Meta(ge=1, le=1024, description="most connections to Redis; more calls than that wait")
    ] = 32
    service_id: Annotated[
        str,
        Meta(
            max_length=128,
            pattern=r"^[A-Za-z0-9._-]*$",
            description="name of this replica; empty: random",
        ),
    ] = ""
    max_slots: Annotated[
        int,
        Meta(
            ge=1, le=65_536, description="most workers, live or not yet swept; a block takes a bit for each"
        ),
    ] = 4096
    match_timeout_s: Annotated[
        float, Meta(gt=0.0, le=10.0, description="deadline of one lookup in Redis")
    ] = 0.05
    publish_timeout_s: Annotated[
        float, Meta(gt=0.0, le=60.0, description="deadline of one write of up to 256 blocks to Redis")
    ] = 1.0
    near_cache_ttl_s: Annotated[
        float,
        Meta(
            ge=0.0,
            le=5.0,
            description="how long hot blocks are answered from memory, so how old an answer may be; 0: never",
        ),
    ] = 0.5
    near_cache_blocks: Annotated[
        int, Meta(ge=1, le=10_000_000, description="most hot blocks in memory, about 200 bytes each")
    ] = 65_536
    announce_ttl_s: Annotated[
        float,
        Meta(gt=0.0, le=60.0, description="how long a gateway's routing decision is known to other gateways"),
    ] = 5.0
    slot_grace_s: Annotated[
        float,
        Meta(ge=0.0, le=3600.0, description="how long a worker may be lost before its blocks are forgotten"),
    ] = 10.0
    sweep_interval_s: Annotated[
        float, Meta(gt=0.0, le=3600.0, description="how often to look for slots of dead workers")
    ] = 1.0
    drain_timeout_s: Annotated[
        float, Meta(ge=0.0, le=600.0, description="after SIGTERM, longest wait for calls under way")
    ] = 2.0
