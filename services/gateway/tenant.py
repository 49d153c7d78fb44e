"""Whose request it is."""

from __future__ import annotations

from hashlib import blake2b, sha256

from msgspec import Struct


class Tenant(Struct, frozen=True):
    """The owner of an API key. `id` is safe to log; "" when the gateway has no keys. `salt` keeps the
    tenant's prefixes apart from everyone else's."""

    id: str = ""
    salt: str = ""

    def cache_salt(self, requested: str | None) -> str:
        """The salt of a request: a tenant can split its own cache further, never reach another's."""
        if not self.salt:
            return requested or ""
        return f"{self.salt}:{requested}" if requested else self.salt


def tenant_of_key(api_key: str, cluster_secret: bytes) -> Tenant:
    """The same on every gateway of a cluster, and useless for finding the key."""
    secret = sha256(cluster_secret).digest()
    name = blake2b(api_key.encode(), key=secret, digest_size=16, person=b"phloem-tenant").hexdigest()
    return Tenant(id=name[:12], salt=name)
