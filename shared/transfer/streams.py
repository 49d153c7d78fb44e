"""CUDA streams of channels, used again by the next ones."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from typing import Any

import torch

# Higher than the page store's: what comes and goes begins before the next pages are gathered.
_PRIORITY = -3


class StreamStock:
    """Of one device. Thread-safe.

    torch gives the same 32 streams to whoever asks, in turn: after a few channels a new one would share some
    with one that is open, or with the page store, and wait for bytes of that one's peer. With streams that
    come back here, sixteen channels can be open before any is shared.
    """

    def __init__(self) -> None:
        self._taking = threading.Lock()
        # Any: torch does not type its streams. Filled without the lock: whoever holds it may drop a stream.
        self._free: deque[Any] = deque()

    def take(self, device: torch.device) -> Any:
        """A stream in which nothing waits, and that nobody else gets while the answer is referred to: the
        engine may still queue a scatter for a channel that has ended."""
        with self._taking:
            stream = self._idle() or torch.cuda.Stream(device, priority=_PRIORITY)  # type: ignore[no-untyped-call]
        lent = torch.cuda.Stream(  # type: ignore[no-untyped-call]
            stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type
        )
        weakref.finalize(lent, self._free.append, stream).atexit = False
        return lent

    def _idle(self) -> Any:
        for _ in range(len(self._free)):
            stream = self._free.popleft()
            if stream.query():
                return stream
            self._free.append(stream)  # its channel has ended, but not all that it waited for
        return None
