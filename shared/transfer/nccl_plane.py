"""A channel's bytes over NCCL, on a stream of the plane's own."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroupNCCL

from phloem.shared.transfer.errors import channel_lost, transfer_timeout
from phloem.shared.transfer.interfaces import interface_of
from phloem.shared.transfer.planes import RANKS, Pending, PlaneSpec
from phloem.shared.transfer.rendezvous import ControlStore

# Measured on 2 x H200: 16 CTAs give 256 GB/s and cost the sender's matmuls 1% (shared/gpu/README.md).
MAX_CTAS = 16
_SPIN_S = 0.001
_POLL_S = 0.000_05
_SLOW_POLL_S = 0.000_5


class NcclPlane:
    """See `DataPlane`. The receive must name exactly the bytes that the peer sends.

    The communicator is made by the first operation, the channel's warm-up, over `store`; NCCL blocks there
    until the peer comes.
    """

    def __init__(self, spec: PlaneSpec, store: ControlStore) -> None:
        _keep_torch_from_ending_the_process()
        _bind_nccl_to(spec.host)
        self._device = torch.device(spec.device)
        self._rank = RANKS[spec.side]
        options = ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=spec.timeout_s)
        options.config.max_ctas = MAX_CTAS
        try:
            with torch.cuda.device(self._device):
                # Any: the stubs lack send and recv, and do not type streams.
                self._group: Any = ProcessGroupNCCL(store, self._rank, 2, options)
                self._stream: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise channel_lost(f"the NCCL group can't be made: {error}") from error

    def post_send(self, data: Tensor) -> Pending:
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                self._group.send([data], 1 - self._rank, 0).wait()  # the stream waits, not this thread
                return self.work_so_far()
        except RuntimeError as error:
            raise channel_lost(f"sending failed: {error}") from error

    def post_receive(self, slot: Tensor, num_bytes: int) -> Pending:
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                self._group.recv([slot[:num_bytes]], 1 - self._rank, 0).wait()
                return self.work_so_far()
        except RuntimeError as error:
            raise channel_lost(f"receiving failed: {error}") from error

    def work_so_far(self) -> Pending:
        with torch.cuda.device(self._device):
            event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        return _PendingEvent(event)

    def abort(self) -> None:
        self._group.abort()


class _PendingEvent:
    """Polls: `cudaEventSynchronize` knows no deadline."""

    # Any: torch does not type its events.
    def __init__(self, event: Any) -> None:
        self._event = event

    def wait(self, timeout_s: float) -> None:
        started = time.monotonic()
        while not self._done():
            waited_s = time.monotonic() - started
            if waited_s >= timeout_s:
                raise transfer_timeout(f"no data moved for {timeout_s:.1f} s")
            time.sleep(_POLL_S if waited_s < _SPIN_S else _SLOW_POLL_S)

    def _done(self) -> bool:
        try:
            return bool(self._event.query())
        except RuntimeError as error:
            raise channel_lost(f"the device failed: {error}") from error


def _keep_torch_from_ending_the_process() -> None:
    """torch's watchdog would, when a peer dies; deadlines and aborts are ours. torch reads these when a group
    is made."""
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    os.environ["TORCH_NCCL_ENABLE_MONITORING"] = "0"


def _bind_nccl_to(host: str) -> None:
    """NCCL's bootstrap sockets take an interface, not an address. The operator's own choice stands."""
    if "NCCL_SOCKET_IFNAME" not in os.environ:
        os.environ["NCCL_SOCKET_IFNAME"] = f"={interface_of(socket.gethostbyname(host))}"
