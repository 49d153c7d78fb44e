"""Things that a device will have done."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch.cuda import Stream


class Pending(Protocol):
    """Something that the device will have done."""

    def done(self) -> bool:
        """Whether `wait` returns at once. Raises `channel_lost` when the device failed."""

    def wait(self, timeout_s: float) -> None:
        """Returns when it is done. Raises `transfer_timeout` or `channel_lost`."""


@runtime_checkable
class Incoming(Pending, Protocol):
    """Bytes that a device receives into a staging slot."""

    @property
    def stream(self) -> Stream:
        """Where their reader is queued: nothing else of the device, nor of another channel, waits in it."""

    def hold_back(self, stream: Stream) -> None:
        """What `stream` is given from now on begins when they have come, or never will, on the device."""


class Moved(Pending, Protocol):
    """Pages on their way between the KV pool and a staging slot."""

    def digest(self) -> int:
        """Of the bytes that moved; only when done."""

    def hold_back(self, stream: Stream) -> None:
        """What `stream` is given from now on begins when they have moved, on the device."""


class SentDigest:
    """The digest of a piece as its sender tells it, in a message of its own. One thread tells, any asks."""

    def __init__(self) -> None:
        self._value: int | None = None
        self._told = threading.Event()

    @property
    def value(self) -> int | None:
        """None until it was told."""
        return self._value

    def tell(self, value: int) -> None:
        self._value = value
        self._told.set()

    def wait(self, timeout_s: float) -> int | None:
        """None when it was not told within `timeout_s`."""
        self._told.wait(timeout_s)
        return self._value


class Done:
    """Launches on a CPU are synchronous."""

    def done(self) -> bool:
        return True

    def wait(self, timeout_s: float) -> None:
        del timeout_s


class MovedNow(Done):
    """Pages that a CPU has moved."""

    def __init__(self, digest: int) -> None:
        self._digest = digest

    def digest(self) -> int:
        return self._digest

    def hold_back(self, stream: Stream) -> None:
        del stream


DONE = Done()
