"""A place in a CUDA stream that can be waited for with a deadline."""

from __future__ import annotations

import time
from typing import Any

import torch

from phloem.shared.transfer.errors import channel_lost, transfer_timeout

HIGH_PRIORITY = -1  # of CUDA streams: short work that should not queue behind matmuls
_SOON_S = 0.01  # pieces take a fraction of a millisecond, or some when matmuls fill the device
_POLL_S = 0.000_05  # a look costs ten microseconds of the interpreter, for which others wait
_LATE_S = 0.000_2
_SLOW_POLL_S = 0.000_5


class RecordedEvent:
    """A CUDA event that was recorded; see `Pending`.

    Polls: `cudaEventSynchronize` knows no deadline.
    """

    def __init__(self, event: Any) -> None:
        """`event`: a `CudaEvent`, or torch's own, which is not typed."""
        self._event = event

    def done(self) -> bool:
        try:
            return bool(self._event.query())
        except RuntimeError as error:
            raise channel_lost(f"the device failed: {error}") from error

    def wait(self, timeout_s: float) -> None:
        started = time.monotonic()
        while not self.done():
            waited_s = time.monotonic() - started
            if waited_s >= timeout_s:
                raise transfer_timeout(f"no data moved for {timeout_s:.1f} s")
            time.sleep(_pause_s(waited_s))

    def hold_back(self, stream: torch.cuda.Stream) -> None:
        """What `stream` is given from now on begins after this, on the device."""
        self._event.wait(stream)


class DeviceEvent(RecordedEvent):
    """All that the calling thread's stream of `device` was given until now."""

    def __init__(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch does not type its events
            event.record()
        super().__init__(event)


def use_device(device: str) -> None:
    """From now on the calling thread's, also for NCCL, which goes back to the one that it found: in a new
    thread to the first device of all, where that would cost a context of its own."""
    if device != "cpu":
        torch.cuda.set_device(torch.device(device))


def settle(device: str, timeout_s: float) -> None:
    """Returns when all is over that the calling thread's stream of `device` was given, which is the steps' as
    a rule; on a CPU at once. Raises `transfer_timeout` or `channel_lost`."""
    if device != "cpu":
        DeviceEvent(torch.device(device)).wait(timeout_s)


class ArrivalEvent(RecordedEvent):
    """See `Incoming`; recorded behind the receive."""

    def __init__(self, event: Any, stream: torch.cuda.Stream) -> None:
        super().__init__(event)
        self.stream = stream


def _pause_s(waited_s: float) -> float:
    """Until the next look: a fifth of what it has taken so far, within bounds."""
    if waited_s >= _SOON_S:
        return _SLOW_POLL_S
    return min(max(_POLL_S, waited_s / 5), _LATE_S)
