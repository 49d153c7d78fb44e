"""A place in a CUDA stream that can be waited for with a deadline."""

from __future__ import annotations

import time
from typing import Any

import torch

from phloem.kernels.cuda_driver import CudaDriver
from phloem.shared.transfer.errors import channel_lost, transfer_timeout

HIGH_PRIORITY = -1  # of CUDA streams: short work that should not queue behind matmuls
USUAL_WAIT_S = 0.02  # for a peer that lives
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
        if not self._comes_within(timeout_s):
            raise transfer_timeout(f"no data moved for {timeout_s:.1f} s")

    def _comes_within(self, seconds: float) -> bool:
        started = time.monotonic()
        while not self.done():
            waited_s = time.monotonic() - started
            if waited_s >= seconds:
                return False
            time.sleep(_pause_s(waited_s))
        return True

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


class PostedEvent(RecordedEvent):
    """Recorded behind a send or a receive, which may wait for a peer that hangs."""

    def __init__(self, event: Any, driver: CudaDriver) -> None:
        super().__init__(event)
        self._driver = driver

    def _comes_within(self, seconds: float) -> bool:
        """While it takes long, nobody keeps the interpreter from who will end it."""
        if super()._comes_within(min(seconds, USUAL_WAIT_S)):
            return True
        with self._driver.giving_way():
            return super()._comes_within(seconds - USUAL_WAIT_S)


class ArrivalEvent(PostedEvent):
    """See `Incoming`."""

    def __init__(self, event: Any, driver: CudaDriver, stream: torch.cuda.Stream) -> None:
        super().__init__(event, driver)
        self.stream = stream


def _pause_s(waited_s: float) -> float:
    """Until the next look: a fifth of what it has taken so far, within bounds."""
    if waited_s >= _SOON_S:
        return _SLOW_POLL_S
    return min(max(_POLL_S, waited_s / 5), _LATE_S)
