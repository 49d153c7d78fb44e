"""Between an engine and its grammar compiler: frames of a 4-byte length and a msgpack body."""

from __future__ import annotations

import socket
import struct
import time
from typing import TypeAlias

import msgspec

from phloem.shared.protocol.session import Grammar

MAX_FRAME_BYTES = 64 * 1024 * 1024
_LENGTH = struct.Struct("<I")


class Vocabulary(msgspec.Struct, frozen=True, tag="vocabulary"):
    """The first frame of a compiler: xgrammar's own description of the tokenizer, as JSON."""

    info: str


class Compiled(msgspec.Struct, frozen=True, tag="compiled"):
    """xgrammar's compiled grammar, as JSON."""

    grammar: str


class Rejected(msgspec.Struct, frozen=True, tag="rejected"):
    message: str


Answer: TypeAlias = Vocabulary | Compiled | Rejected

_decode_answer = msgspec.msgpack.Decoder(Vocabulary | Compiled | Rejected).decode
_decode_grammar = msgspec.msgpack.Decoder(Grammar).decode
_encode = msgspec.msgpack.Encoder().encode


class CompilerSocket:
    """One end. Reading and writing raise `EOFError` when the other end is gone or sends too much, and
    `TimeoutError` past the deadline (on the clock of `time.monotonic`)."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def send(self, message: Answer | Grammar, timeout_s: float | None = None) -> None:
        """Waits for ever without a time-out. Raises `TimeoutError`, and `EOFError` when the other side has
        gone."""
        data = _encode(message)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.sendall(_LENGTH.pack(len(data)) + data)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise EOFError(str(error)) from error

    def read_answer(self, deadline_s: float) -> Answer:
        answer: Answer = _decode_answer(self._read(deadline_s))
        return answer

    def read_grammar(self) -> Grammar:
        """Waits for ever: a compiler has nothing else to do."""
        return _decode_grammar(self._read(None))

    def close(self) -> None:
        self._socket.close()

    def _read(self, deadline_s: float | None) -> bytes:
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size, deadline_s))
        if length > MAX_FRAME_BYTES:
            raise EOFError(f"a frame of {length} bytes")
        return self._exactly(length, deadline_s)

    def _exactly(self, count: int, deadline_s: float | None) -> bytes:
        data = bytearray()
        while len(data) < count:
            left_s = None if deadline_s is None else deadline_s - time.monotonic()
            if left_s is not None and left_s <= 0:
                raise TimeoutError("past the deadline")
            self._socket.settimeout(left_s)
            try:
                piece = self._socket.recv(min(count - len(data), 1 << 20))
            except ConnectionResetError as error:  # it ended without having read what was sent
                raise EOFError(str(error)) from error
            if not piece:
                raise EOFError("the other end is gone")
            data += piece
        return bytes(data)
