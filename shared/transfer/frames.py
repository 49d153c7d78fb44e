"""Length-prefixed frames over a connected TCP socket, with deadlines.

A frame is a 4-byte big-endian length and as many bytes. An empty frame says only that the sender lives.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time

from phloem.shared.transfer.errors import channel_lost, protocol_violation, transfer_timeout

_LENGTH = struct.Struct(">I")
KEEPALIVE = b""
_READ_BYTES = 65_536


class FrameSocket:
    """One thread may read while another writes. Owns the socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._ahead = bytearray()  # read, but not asked for yet: a frame rarely comes alone, nor in parts
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def set_timeout(self, timeout_s: float) -> None:
        """The longest silence of the peer that `read` and `write` bear."""
        self._socket.settimeout(timeout_s)

    def write(self, payload: bytes) -> None:
        try:
            self._socket.sendall(_LENGTH.pack(len(payload)) + payload)
        except TimeoutError as error:
            raise transfer_timeout("the peer takes no control messages") from error
        except OSError as error:
            raise channel_lost(f"control connection broke: {error}") from error

    def read(self, max_bytes: int, deadline: float | None = None) -> bytes:
        """One frame. `deadline` (of `time.monotonic`) bounds all of it, instead of each silence; only while
        no other thread writes.

        Raises `channel_lost` when the peer closed, `transfer_timeout` when it is silent for too long,
        `transfer_protocol` when the frame is longer than `max_bytes`.
        """
        (length,) = _LENGTH.unpack(self._take(_LENGTH.size, deadline))
        if length > max_bytes:
            raise protocol_violation(f"frame of {length} bytes is over {max_bytes}")
        return self._take(length, deadline)

    def shutdown(self) -> None:
        """Wakes both threads; safe to call at any time and more than once."""
        with contextlib.suppress(OSError):  # not connected any more
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Only when no thread uses the socket."""
        self._socket.close()

    def _take(self, num_bytes: int, deadline: float | None) -> bytes:
        while len(self._ahead) < num_bytes:
            self._ahead += self._read_some(deadline)
        taken = bytes(self._ahead[:num_bytes])
        del self._ahead[:num_bytes]
        return taken

    def _read_some(self, deadline: float | None) -> bytes:
        try:
            if deadline is not None:
                self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            data = self._socket.recv(_READ_BYTES)
        except TimeoutError as error:
            raise transfer_timeout("the peer is silent") from error
        except OSError as error:
            raise channel_lost(f"control connection broke: {error}") from error
        if not data:
            raise channel_lost("the peer closed the control connection")
        return data
