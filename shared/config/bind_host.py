"""The address that a service binds to, from what `--host` says.

A service listens on a named address, never on all by accident. In a container the address is not known
before it runs, so `--host` may also say where to find it: `auto-private`, or `if:eth0`.
"""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from collections.abc import Mapping

from phloem.shared.errors import ConfigError

AUTO_PRIVATE = "auto-private"
INTERFACE_PREFIX = "if:"

_SIOCGIFADDR = 0x8915
_IFREQ_BYTES = 256


def resolve_host(host: str, addresses: Mapping[str, str] | None = None) -> str:
    """The address to bind: `host` itself, or the IPv4 address of the interface it asks for.

    `addresses` (interface name -> IPv4 address) are this machine's unless given. Raises `ConfigError` when
    the interface has no address, or `auto-private` finds no or several private addresses.
    """
    if host != AUTO_PRIVATE and not host.startswith(INTERFACE_PREFIX):
        return host
    found = interface_addresses() if addresses is None else addresses
    if host == AUTO_PRIVATE:
        return _the_private_one(found)
    name = host.removeprefix(INTERFACE_PREFIX)
    if name not in found:
        raise ConfigError(
            f"--host {host}: no such interface with an IPv4 address; there are {_listed(found)}."
        )
    return found[name]


def _the_private_one(addresses: Mapping[str, str]) -> str:
    private = {name: address for name, address in addresses.items() if _is_private(address)}
    if len(private) != 1:
        problem = "no private address" if not private else "more than one private address"
        raise ConfigError(
            f"--host {AUTO_PRIVATE}: this machine has {problem} ({_listed(addresses)}). "
            f"Name one: --host ADDRESS or --host {INTERFACE_PREFIX}INTERFACE."
        )
    return next(iter(private.values()))


def _is_private(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return parsed.is_private and not parsed.is_loopback and not parsed.is_link_local


def _listed(addresses: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {address}" for name, address in addresses.items()) or "none"


def interface_addresses() -> dict[str, str]:
    """The first IPv4 address of each interface that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack(f"{_IFREQ_BYTES}s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:  # the interface has no IPv4 address
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found
