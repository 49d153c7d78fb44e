"""Server-sent events out of a byte stream."""

from __future__ import annotations


class EventSplitter:
    """Cuts a response's body into the data of its events (WHATWG HTML, section 9.2).

    Comments and the fields `event`, `id` and `retry` are dropped; several `data` lines of one event are
    joined with a line feed. Lines may end in LF or CRLF.
    """

    __slots__ = ("_data", "_rest")

    def __init__(self) -> None:
        self._rest = b""  # a line whose end has not come
        self._data: list[bytes] = []  # data lines of the event that has not ended

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of the events that `chunk` completes."""
        lines = (self._rest + chunk if self._rest else chunk).split(b"\n")
        self._rest = lines.pop()
        events = []
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[5:].strip())
            elif self._data and (not line or line == b"\r"):
                events.append(self._data[0] if len(self._data) == 1 else b"\n".join(self._data))
                self._data = []
        return events
