"""Events of which only the text changes."""

from __future__ import annotations

import msgspec

_encode = msgspec.json.Encoder().encode

# Stands for the text in an encoded event. No model is called that, and ids are our own.
TEXT = "\0the text\0"
_TEXT_JSON = _encode(TEXT)


class TextEvent:
    """The bytes around the text of one choice's events, so that a token costs one string and no structs."""

    def __init__(self, encoded: bytes) -> None:
        """`encoded` is such an event whose text is `TEXT`."""
        self._before, found, self._after = encoded.partition(_TEXT_JSON)
        assert found

    def of(self, text: str) -> bytes:
        """The JSON of the event with this text."""
        return self._before + _encode(text) + self._after
