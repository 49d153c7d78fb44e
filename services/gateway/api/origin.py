"""Which web pages are this machine's own.

A browser sends requests to a loopback address for any page that it has open, and says in `Origin` whose page
it is: always with a POST, which needs no permission beforehand (CORS) when its body is like a form's or text.
"""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import urlsplit


def is_foreign(origin: str | None) -> bool:
    """Whether a web page sent the request that this machine did not serve. Without the header none did."""
    if origin is None:
        return False
    try:
        host = urlsplit(origin).hostname or ""
    except ValueError:
        return True
    return not (host == "localhost" or host.endswith(".localhost") or _is_loopback(host))


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
