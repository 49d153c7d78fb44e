"""Where endpoints listen, and "host:port" apart."""

from __future__ import annotations

import socket

from phloem.shared.errors import PhloemError


def listen_on(host: str) -> socket.socket:
    """A listening socket on a free port of `host`. Raises `address_unavailable` when it can't be bound."""
    try:
        return socket.create_server((host, 0), backlog=128)
    except OSError as error:
        raise PhloemError(
            "address_unavailable", f"can't listen for KV transfer on {host}: {error}. Is --host right?"
        ) from error


def parse_address(address: str) -> tuple[str, int]:
    """ "host:port" apart. Raises `bad_address`."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise PhloemError("bad_address", f"{address!r} is not host:port")
    return host, int(port)
