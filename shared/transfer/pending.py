"""Things that a device will have done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch.cuda import Stream


class Pending(Protocol):
    """Something that the device will have done."""

    def done(self) -> bool:
        """Whether `wait` returns at once. Raises `channel_lost` when the device failed."""

    def wait(self, timeout_s: float) -> None:
        """Returns when it is done. Raises `transfer_timeout` or `channel_lost`."""


class Moved(Pending, Protocol):
    """Pages on their way between the KV pool and a staging slot."""

    def digest(self) -> int:
        """Of the bytes that moved; only when done."""

    def hold_back(self, stream: Stream) -> None:
        """What `stream` is given from now on begins when they have moved, on the device."""


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
