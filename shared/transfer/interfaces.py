"""The network interface behind an address: NCCL is bound by name."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

from phloem.shared.host_port import family_of
from phloem.shared.transfer.errors import channel_lost

_SIOCGIFADDR = 0x8915


def nccl_binding(host: str) -> dict[str, str]:
    """NCCL's variables for sockets on the interface that has the address of `host`, an address or a name.
    Raises `channel_lost` when none has."""
    try:
        family = family_of(host)
        address = socket.getaddrinfo(host, None, family, socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise channel_lost(f"{host} is no address: {error}") from error
    binding = {"NCCL_SOCKET_IFNAME": f"={interface_of(str(address))}"}
    return binding | {"NCCL_SOCKET_FAMILY": "AF_INET6"} if family == socket.AF_INET6 else binding


def interface_of(address: str) -> str:
    """The network interface that has this IP address. Raises `channel_lost` when none has."""
    wanted = ipaddress.ip_address(address.partition("%")[0])
    if wanted.is_loopback:
        return "lo"
    for name, found in _ipv6_addresses() if wanted.version == 6 else _ipv4_addresses():
        if found == wanted:
            return name
    raise channel_lost(f"no network interface has the address {address}")


def _ipv4_addresses() -> list[tuple[str, ipaddress.IPv4Address]]:
    """Of each interface the first."""
    names = [name for _, name in socket.if_nameindex()]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return [(name, address) for name in names if (address := _ipv4_address(sock, name)) is not None]


def _ipv4_address(sock: socket.socket, interface: str) -> ipaddress.IPv4Address | None:
    request = struct.pack("256s", interface.encode()[:15])
    try:
        return ipaddress.IPv4Address(fcntl.ioctl(sock.fileno(), _SIOCGIFADDR, request)[20:24])
    except OSError:  # the interface has no IPv4 address
        return None


def _ipv6_addresses() -> list[tuple[str, ipaddress.IPv6Address]]:
    """As Linux lists them: the address in 32 hexadecimal digits comes first, the interface last."""
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:  # no IPv6 here
        return []
    return [(line.split()[-1], ipaddress.IPv6Address(int(line.split()[0], 16))) for line in lines]
