"""Length-prefixed frames over a connected TCP socket, with deadlines.

A frame is a 4-byte big-endian length and as many bytes. An empty frame says only that the sender lives.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time

from phloem.shared.transfer.errors import channel_lost, protocol_violation, transfer_timeout

_LENGTH = struct.Struct(">I")
KEEPALIVE = b""
_READ_BYTES = 65_536
_MAX_UNSENT_BYTES = 4 * 1024 * 1024
_TIMEOUT_S = 10.0  # until one is set


class FrameSocket:
    """One thread may read while others write. Owns the socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._ahead = bytearray()  # read, but not asked for yet: a frame rarely comes alone, nor in parts
        self._writing = threading.Lock()  # guards the next one; nobody waits for the peer with it
        self._unsent = bytearray()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not sock.gettimeout():  # a socket with a timeout never blocks by itself
            sock.settimeout(_TIMEOUT_S)

    def set_timeout(self, timeout_s: float) -> None:
        """The longest silence of the peer that `read`, `write` and `flush` bear."""
        self._socket.settimeout(timeout_s)

    @property
    def is_flushed(self) -> bool:
        """The system has all that was written."""
        return not self._unsent

    def post(self, payload: bytes) -> bool:
        """Writes a frame without waiting for the peer; False: some of it is left, and `flush` is due."""
        with self._writing:
            self._unsent += _LENGTH.pack(len(payload)) + payload
            if len(self._unsent) > _MAX_UNSENT_BYTES:
                raise transfer_timeout("the peer takes no control messages")
            return self._send_some()

    def flush(self) -> None:
        """Waits until the system has all that was written."""
        while not self.is_flushed:
            self._wait_for_room()
            with self._writing:
                self._send_some()

    def write(self, payload: bytes) -> None:
        self.post(payload)
        self.flush()

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

    def _send_some(self) -> bool:
        """As much as the system takes now; whether that was all."""
        try:
            while self._unsent:
                del self._unsent[: os.write(self._socket.fileno(), self._unsent)]
        except BlockingIOError:
            return False
        except OSError as error:
            raise channel_lost(f"control connection broke: {error}") from error
        return True

    def _wait_for_room(self) -> None:
        poll = select.poll()
        try:
            poll.register(self._socket, select.POLLOUT)
            if not poll.poll(1e3 * (self._socket.gettimeout() or _TIMEOUT_S)):
                raise transfer_timeout("the peer takes no control messages")
        except (OSError, ValueError) as error:  # ValueError: closed by now
            raise channel_lost(f"control connection broke: {error}") from error

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
