"""Which web pages are this machine's own.

A browser sends requests to a loopback address for any page that it has open, and says in `Origin` whose page
it is: always with a POST, which needs no permission beforehand (CORS) when its body is like a form's or text.
With a GET it may say nothing; but a page that may read the answer has the address's own origin, and who owns
a name can let it mean this machine (DNS rebinding): then `Host` has that name.
"""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import urlsplit


def foreign_header(origin: str | None, host: str | None) -> str | None:
    """Which header tells that a web page sent the request that this machine did not serve; None: neither.
    Without both no browser did."""
    if origin is not None and _is_foreign(origin):
        return "Origin"
    return "Host" if host is not None and _is_foreign(f"//{host}") else None


def _is_foreign(url: str) -> bool:
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        return True
    return not (host == "localhost" or host.endswith(".localhost") or _is_loopback(host))


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
