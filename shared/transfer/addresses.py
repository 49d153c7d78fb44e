"""Where endpoints listen."""

from __future__ import annotations

import socket

from phloem.shared.errors import PhloemError
from phloem.shared.host_port import family_of


def listen_on(host: str) -> socket.socket:
    """A listening socket on a free port of `host`. Raises `address_unavailable` when it can't be bound."""
    try:
        return socket.create_server((host, 0), family=family_of(host), backlog=128)
    except OSError as error:
        raise PhloemError(
            "address_unavailable", f"can't listen for KV transfer on {host}: {error}. Is --host right?"
        ) from error
