"""Agreement on the cluster secret, from which RPC tokens and block-hash keys are derived."""

from __future__ import annotations

import secrets

from phloem.shared.discovery import keys
from phloem.shared.discovery.registry import Registry

_SECRET_BYTES = 32


async def cluster_secret(registry: Registry, configured: str = "") -> bytes:
    """The configured secret when there is one, else the one that the first process left in Redis.

    Who can read Redis can read the secret: between hosts, protect Redis or configure the secret.
    """
    if configured:
        return configured.encode()
    proposal = secrets.token_hex(_SECRET_BYTES)
    await registry.link.command("SET", keys.CLUSTER_SECRET, proposal, "NX")
    value: bytes | None = await registry.link.command("GET", keys.CLUSTER_SECRET)
    return value if value is not None else await cluster_secret(registry)


async def reassert_secret(registry: Registry, secret: bytes) -> None:
    """Puts the agreed secret back after Redis lost its data, so that later processes find the same.

    Call it from `LeaseKeeper`'s `on_regained` (in a task), and only when none is configured.
    """
    await registry.link.command("SET", keys.CLUSTER_SECRET, secret, "NX")
