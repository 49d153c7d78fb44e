"""A socket's `send` and `recv` without waiting, and without a word to other threads.

Python's own let go of the interpreter for each system call, and who wants it back may wait while others have
their turn; with a timeout they ask `poll` first besides. A call that never waits needs neither.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket

_RECEIVED_BYTES = 65_536
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class SocketCalls:
    """For one socket; one thread may receive while others, one at a time, send."""

    def __init__(self) -> None:
        library = ctypes.PyDLL(None, use_errno=True)
        self._send, self._recv = library.send, library.recv
        for call in (self._send, self._recv):
            call.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
            call.restype = ctypes.c_ssize_t
        self._received = ctypes.create_string_buffer(_RECEIVED_BYTES)

    def send(self, number: int, data: bytes) -> int:
        """How many bytes the system took of socket `number`; 0: it has no room. Raises `OSError`."""
        return max(0, _checked(self._send(number, data, len(data), _FLAGS)))

    def receive(self, number: int) -> bytes | None:
        """What has come; None: nothing yet; b"": the peer has closed. Raises `OSError`."""
        size = _checked(self._recv(number, self._received, _RECEIVED_BYTES, _FLAGS))
        return None if size < 0 else ctypes.string_at(self._received, size)


def _checked(result: int) -> int:
    """-1: it would have to wait."""
    if result < 0:
        code = ctypes.get_errno()
        if code not in (errno.EAGAIN, errno.EWOULDBLOCK, errno.EINTR):
            raise OSError(code, os.strerror(code))
    return result
