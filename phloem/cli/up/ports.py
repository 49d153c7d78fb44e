"""Is a port free? Asked before anything starts, so that the answer names the flag."""

from __future__ import annotations

import errno
import socket

from phloem.shared.errors import ConfigError
from phloem.shared.host_port import host_port


def require_free_port(host: str, port: int, flag: str) -> None:
    """Raises `ConfigError`, naming `flag`, when `host`:`port` can't be listened on."""
    try:
        with bound_socket(host, port):
            pass
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} on {host} is in use by another process: choose another with {flag}, or stop it "
                f"(`ss -ltnp 'sport = :{port}'` shows it).",
                param=flag,
            ) from error
        raise ConfigError(
            f"can't listen on {host_port(host, port)}: {error.strerror} (see {flag}).", param=flag
        ) from error


def free_port(host: str) -> int:
    """A port that was free a moment ago."""
    with bound_socket(host, 0) as listener:
        port: int = listener.getsockname()[1]
        return port


def bound_socket(host: str, port: int) -> socket.socket:
    """A listening socket, as a server would open it. Raises `OSError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1)
    except OSError:
        listener.close()
        raise
    return listener
