"""MessagePack encoding with a cap on what is decoded."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec

from phloem.shared.errors import PhloemError

T = TypeVar("T")

MAX_MESSAGE_BYTES = 64 * 1024 * 1024


class Codec(Generic[T]):
    """Encodes and decodes one message type or tagged union.

    `decode` raises `PhloemError` (`bad_message`) when the bytes are too long or are not a `T`; a peer's
    bytes are never trusted.
    """

    def __init__(self, message_type: Any, *, max_bytes: int = MAX_MESSAGE_BYTES) -> None:
        # Any: a tagged union (`A | B`) is not a `type[T]` to the type checker.
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(message_type)
        self._max_bytes = max_bytes

    def encode(self, message: T) -> bytes:
        return self._encoder.encode(message)

    def decode(self, data: bytes | bytearray | memoryview) -> T:
        """Raises `PhloemError` (`bad_message`) when it is too long, or no such message."""
        if len(data) > self._max_bytes:
            raise PhloemError("bad_message", f"message of {len(data)} bytes is over {self._max_bytes}")
        try:
            return self._decoder.decode(data)
        except msgspec.DecodeError as error:
            raise PhloemError("bad_message", f"message can't be decoded: {error}") from error
