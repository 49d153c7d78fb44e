"""The network interface behind an address: NCCL is bound by name."""

from __future__ import annotations

import fcntl
import socket
import struct

from phloem.shared.transfer.errors import channel_lost

_SIOCGIFADDR = 0x8915


def interface_of(address: str) -> str:
    """The network interface that has this IPv4 address. Raises `channel_lost` when none has."""
    if address.startswith("127."):
        return "lo"
    for _, name in socket.if_nameindex():
        if _address_of(name) == address:
            return name
    raise channel_lost(f"no network interface has the address {address}")


def _address_of(interface: str) -> str | None:
    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            return socket.inet_ntoa(fcntl.ioctl(sock.fileno(), _SIOCGIFADDR, request)[20:24])
        except OSError:  # the interface has no IPv4 address
            return None
