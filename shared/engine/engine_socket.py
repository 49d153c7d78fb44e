"""The engine's end of the socket to its front: frames in on a thread, frames out from the loop."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from typing import NamedTuple

from phloem.shared.engine.config import EngineConfig, engine_config
from phloem.shared.errors import PhloemError
from phloem.shared.protocol.codec import MAX_MESSAGE_BYTES
from phloem.shared.protocol.engine import EngineMessage, EngineUp, engine_down, engine_up

_LENGTH = struct.Struct("<I")


class FrontGone(NamedTuple):
    """The front closed the socket, or sent nonsense; the engine ends."""

    message: str


class EngineSocket:
    """Frames are a 4-byte little-endian length and a msgpack body. `send` blocks when the front lags, which
    is the engine's back-pressure."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(True)

    def read_config(self) -> EngineConfig:
        """The first frame. Raises `PhloemError` when the front is gone before it."""
        return engine_config.decode(self._read_frame())

    def start_reading(self, deliver: Callable[[EngineMessage | FrontGone], None]) -> None:
        """From now on every message goes to `deliver`, on a thread of its own; the last is `FrontGone`."""
        threading.Thread(target=self._read_all, args=(deliver,), name="front-reader", daemon=True).start()

    def send(self, message: EngineUp) -> None:
        """Raises `OSError` when the front is gone."""
        data = engine_up.encode(message)
        self._socket.sendall(_LENGTH.pack(len(data)) + data)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read_all(self, deliver: Callable[[EngineMessage | FrontGone], None]) -> None:
        try:
            while True:
                for message in engine_down.decode(self._read_frame()).messages:
                    deliver(message)
        except (PhloemError, OSError) as error:
            deliver(FrontGone(str(error)))

    def _read_frame(self) -> bytes:
        (length,) = _LENGTH.unpack(self._read_exactly(_LENGTH.size))
        if length > MAX_MESSAGE_BYTES:
            raise PhloemError("bad_message", f"frame of {length} bytes from the front")
        return self._read_exactly(length)

    def _read_exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            piece = self._socket.recv(count - len(data))
            if not piece:
                raise PhloemError("front_gone", "the front closed the socket")
            data += piece
        return bytes(data)
