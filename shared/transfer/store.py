"""The TCPStore over which the two ranks of a channel find each other; the decode side hosts it.

TCPStore has no authentication, so it listens on the named address only and holds nothing but rank addresses.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in the stubs

from phloem.shared.errors import PhloemError
from phloem.shared.transfer.errors import channel_lost, transfer_timeout

_FIRST_PAUSE_S = 0.001
_MAX_PAUSE_S = 0.02


def listen_on(host: str) -> socket.socket:
    """A listening socket on a free port of `host`. Raises `address_unavailable` when it can't be bound."""
    try:
        return socket.create_server((host, 0), backlog=128)
    except OSError as error:
        raise PhloemError(
            "address_unavailable", f"can't listen for KV transfer on {host}: {error}. Is --host right?"
        ) from error


class StoreHost:
    """The store of one endpoint."""

    def __init__(self, host: str, timeout_s: float) -> None:
        sock = listen_on(host)
        port: int = sock.getsockname()[1]
        self.address = f"{host}:{port}"
        # A socket of our own keeps the store off 0.0.0.0, where it would listen by itself; it closes the
        # descriptor that it is given.
        # Any: the stubs lack TCPStore.
        self._store: Any = TCPStore(
            host,
            port,
            None,
            True,
            timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=sock.detach(),
        )

    def forget(self, channel_name: str) -> None:
        """Drops a channel's keys, so that reconnects don't pile them up."""
        with contextlib.suppress(RuntimeError):  # the store is gone: so are its keys
            for key in self._store.list_keys():
                if key.strip("/").startswith(f"{channel_name}/"):
                    self._store.delete_key(key)

    def num_keys(self) -> int:
        """For tests: the store's own bookkeeping and the keys of open channels."""
        return int(self._store.num_keys())

    def close(self) -> None:
        """Stops listening; open channels live on. Not used any more after it."""
        self._store = None  # the server's thread and sockets end with the object


def join_store(address: str, timeout_s: float) -> Any:
    """A client of the store at "host:port", of its own: a wait on one blocks nobody else.

    Raises `channel_lost`. Any: the stubs lack TCPStore.
    """
    host, port = parse_address(address)
    try:
        return TCPStore(host, port, None, False, timedelta(seconds=timeout_s), wait_for_workers=False)
    except RuntimeError as error:
        raise channel_lost(f"the store at {address} does not answer: {error}") from error


def meet(store: Any, rank: int, timeout_s: float, check: Callable[[], None]) -> None:
    """Returns once both ranks have come to `store`, so that what follows does not wait for the peer.

    `check` is called now and then, and raises when the meeting is off. Raises `transfer_timeout`.
    """
    deadline = time.monotonic() + timeout_s
    pause_s = _FIRST_PAUSE_S
    try:
        store.set(f"here/{rank}", b"1")
        while not store.check([f"here/{1 - rank}"]):
            check()
            if time.monotonic() > deadline:
                raise transfer_timeout("the peer did not come to the store")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)
    except RuntimeError as error:
        raise channel_lost(f"the store broke: {error}") from error


def parse_address(address: str) -> tuple[str, int]:
    """ "host:port" apart. Raises `bad_address`."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise PhloemError("bad_address", f"{address!r} is not host:port")
    return host, int(port)
