"""The token that services of one cluster show each other."""

from __future__ import annotations

import hmac
from hashlib import blake2b

TOKEN_METADATA_KEY = "x-phloem-token"


def service_token(cluster_secret: bytes) -> str:
    """The token derived from the cluster secret; the secret itself never crosses a wire."""
    return blake2b(cluster_secret, digest_size=24, person=b"phloem-rpc").hexdigest()


def token_matches(shown: str | bytes | None, expected: str) -> bool:
    """Whether `shown` is the token, in constant time."""
    if shown is None:
        return False
    shown_bytes = shown.encode() if isinstance(shown, str) else shown
    return hmac.compare_digest(shown_bytes, expected.encode())
