"""Facts about one HTTP request that outlive its handler."""

from __future__ import annotations

from msgspec import Struct

from phloem.services.gateway.tenant import Tenant


class Call(Struct, frozen=True, kw_only=True):
    """`received_at` is on the monotonic clock, `created` is Unix time; `wants_timeline` asks for the
    `phloem` field in the answer."""

    request_id: str
    tenant: Tenant
    received_at: float
    created: int
    wants_timeline: bool
