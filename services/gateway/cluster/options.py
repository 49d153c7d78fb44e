"""The cluster client's flags."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from phloem.services.gateway.policies.snapshot import RoutingPolicy


class ClusterOptions(Struct, frozen=True, kw_only=True):
    """How requests are routed, retried and bounded."""

    routing_policy: Annotated[
        RoutingPolicy,
        Meta(description="cost: the pair that is cheapest in seconds; the others are there to compare with"),
    ] = "cost"
    cache_threshold: Annotated[
        float, Meta(ge=0.0, le=1.0, description="cache_aware: share of a prompt from which a match decides")
    ] = 0.3
    balance_abs_threshold: Annotated[
        int, Meta(ge=0, description="cache_aware: difference in requests from which load may decide")
    ] = 64
    balance_rel_threshold: Annotated[
        float, Meta(ge=1.0, description="cache_aware: and the ratio that it also takes")
    ] = 1.5
    index_timeout_s: Annotated[
        float, Meta(gt=0.0, le=10.0, description="deadline of a look-up in the cache index; then load only")
    ] = 0.005
    max_attempts: Annotated[
        int, Meta(ge=1, le=100, description="how often a request is submitted when workers fail")
    ] = 3
    worker_wait_s: Annotated[
        float, Meta(ge=0.0, le=3600.0, description="how long a request waits for a worker to appear")
    ] = 5.0
    handover_grace_s: Annotated[
        float, Meta(gt=0.0, le=600.0, description="how long decode may take to notice that prefill died")
    ] = 3.0
    worker_silence_s: Annotated[
        float, Meta(gt=0.0, le=600.0, description="silence after which a worker without lease is lost")
    ] = 2.0
    session_connect_timeout_s: Annotated[
        float, Meta(gt=0.0, le=600.0, description="deadline of opening a session with a worker")
    ] = 5.0
    session_outbox_messages: Annotated[
        int, Meta(ge=1, le=1_000_000, description="messages that may wait for one worker before 503")
    ] = 8192
