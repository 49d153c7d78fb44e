"""HOST:PORT, together and apart: the one place that knows of the brackets around IPv6 addresses."""

from __future__ import annotations

import socket

from phloem.shared.errors import PhloemError


def host_port(host: str, port: int) -> str:
    """HOST:PORT as URLs and gRPC take it, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def split_host_port(address: str) -> tuple[str, int]:
    """HOST:PORT apart, without brackets. Raises `bad_address`."""
    host, _, port = address.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    bracketed = bare != host
    if not bare or (":" in bare) != bracketed or not port.isdecimal() or not 0 < int(port) < 65536:
        raise PhloemError(
            "bad_address", f"{address!r} is not host:port (an IPv6 address goes in brackets: [::1]:80)"
        )
    return bare, int(port)


def family_of(host: str) -> socket.AddressFamily:
    """What a socket for `host`, an address or a name, is made of. Raises `OSError` for a name that nobody
    knows."""
    return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
