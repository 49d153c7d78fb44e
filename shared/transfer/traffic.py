"""What the channels of a device have under way there."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Protocol

_LOOK_S = 0.002


class Posted(Protocol):
    """A place in a stream."""

    def query(self) -> bool:
        """All before it is done. Raises `RuntimeError` when the device has failed."""


@dataclass(eq=False)
class Lane:
    """Of one channel; its operations end in the order in which they are posted."""

    newest: Posted | None = None  # behind the last of them


class DeviceTraffic:
    """Thread-safe.

    CUDA frees memory when all is done that the device was given by then, and lets no thread give it more
    until that. NCCL frees some whenever it takes a channel apart, also while a receive of another channel
    waits for a peer that hangs: the whole engine would stand still until that one's deadline. So who takes
    one apart lets those operations end first.
    """

    def __init__(self) -> None:
        self._lanes: set[Lane] = set()
        self._changing = threading.Lock()

    def enter(self) -> Lane:
        lane = Lane()
        with self._changing:
            self._lanes.add(lane)
        return lane

    def leave(self, lane: Lane) -> None:
        """Nobody waits for its operations any more: its channel is about to be aborted, or was."""
        with self._changing:
            self._lanes.discard(lane)

    def settle(self, timeout_s: float) -> None:
        """Returns when all that is posted now has ended, or its channel has left, or when the time is over.
        What is posted meanwhile is not waited for."""
        deadline = time.monotonic() + timeout_s
        with self._changing:
            waiting = [(lane, lane.newest) for lane in self._lanes]
        while waiting := [(lane, event) for lane, event in waiting if lane in self._lanes and _runs(event)]:
            if time.monotonic() >= deadline:
                return
            time.sleep(_LOOK_S)


def _runs(event: Posted | None) -> bool:
    try:
        return event is not None and not event.query()
    except RuntimeError:
        return False
