"""Length-prefixed frames over a connected TCP socket, with deadlines.

A frame is a 4-byte big-endian length and as many bytes. An empty frame says only that the sender lives.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time

from phloem.shared.transfer.errors import channel_lost, protocol_violation, transfer_timeout
from phloem.shared.transfer.socket_calls import SocketCalls

_LENGTH = struct.Struct(">I")
KEEPALIVE = b""
_MAX_UNSENT_BYTES = 4 * 1024 * 1024
_TIMEOUT_S = 10.0  # until one is set


class FrameSocket:
    """One thread may read while others write. Owns the socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._calls = SocketCalls()
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

    def post(self, *payloads: bytes) -> bool:
        """Writes frames, at once, without waiting for the peer; False: something is left, and `flush` is
        due."""
        with self._writing:
            for payload in payloads:
                self._unsent += _LENGTH.pack(len(payload)) + payload
            if len(self._unsent) > _MAX_UNSENT_BYTES:
                raise transfer_timeout("the peer takes no control messages")
            return self._send_some()

    def flush(self, deadline: float | None = None) -> None:
        """Waits until the system has all that was written."""
        while not self.is_flushed:
            if not self._wait(select.POLLOUT, deadline):
                raise transfer_timeout("the peer takes no control messages")
            with self._writing:
                self._send_some()

    def write(self, payload: bytes, deadline: float | None = None) -> None:
        """One frame. `deadline` as for `read`; raises the same."""
        self.post(payload)
        self.flush(deadline)

    @property
    def has_frame(self) -> bool:
        """For who reads: `read` returns at once."""
        ahead = self._ahead
        return len(ahead) >= _LENGTH.size and len(ahead) - _LENGTH.size >= _LENGTH.unpack_from(ahead)[0]

    def read(self, max_bytes: int, deadline: float | None = None) -> bytes:
        """One frame. `deadline` (of `time.monotonic`) bounds all of it, instead of each silence.

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
        """Only when no thread reads or flushes. Who still posts is waited for, or fails: the system may give
        the socket's number away at once."""
        with self._writing:
            self._socket.close()

    def _send_some(self) -> bool:
        """As much as the system takes now; whether that was all."""
        try:
            while self._unsent:
                taken = self._calls.send(self._socket.fileno(), bytes(self._unsent))
                if not taken:
                    return False
                del self._unsent[:taken]
        except OSError as error:
            raise channel_lost(f"control connection broke: {error}") from error
        return True

    def _wait(self, kind: int, deadline: float | None) -> bool:
        """Until the socket is ready for it, or has failed; whether that is so. Nobody waits past a deadline,
        not a moment: a peer that drips bytes would go on and on."""
        wait_s = self._socket.gettimeout() or _TIMEOUT_S
        if deadline is not None and (wait_s := deadline - time.monotonic()) <= 0:
            return False
        poll = select.poll()
        try:
            poll.register(self._socket, kind)
            return bool(poll.poll(1e3 * wait_s))
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
            while (data := self._calls.receive(self._socket.fileno())) is None:
                if not self._wait(select.POLLIN, deadline):
                    raise transfer_timeout("the peer is silent, or too slow")
        except OSError as error:
            raise channel_lost(f"control connection broke: {error}") from error
        if not data:
            raise channel_lost("the peer closed the control connection")
        return data
