"""A channel's bytes over NCCL, on a stream of the plane's own."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroupNCCL

from phloem.shared.transfer.device_event import HIGH_PRIORITY, ArrivalEvent, DeviceEvent
from phloem.shared.transfer.errors import channel_lost
from phloem.shared.transfer.interfaces import nccl_binding
from phloem.shared.transfer.pending import Incoming, Moved, Pending
from phloem.shared.transfer.planes import RANKS, PlaneSpec
from phloem.shared.transfer.rendezvous import ControlStore


class NcclPlane:
    """See `DataPlane`. The receive must name exactly the bytes that the peer sends.

    NCCL blocks until the peer comes. One communicator serves both directions: the operations of a channel are
    in one order anyway.
    """

    def __init__(self, spec: PlaneSpec, store: ControlStore) -> None:
        _keep_torch_from_ending_the_process()
        _bind_nccl_to(spec.host)
        self._device = torch.device(spec.device)
        # torch may have given the channel's slots memory that a step uses which was launched before and still
        # runs: what is left of it must be over before anything else is written there.
        DeviceEvent(self._device).wait(spec.timeout_s)
        self._rank = RANKS[spec.side]
        options = ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=spec.timeout_s)
        options.config.max_ctas = spec.max_ctas
        options.is_high_priority_stream = True  # few and short, among matmuls that fill the device
        try:
            with torch.cuda.device(self._device):
                # Any: the stubs lack send and recv, and do not type streams.
                self._group: Any = ProcessGroupNCCL(store, self._rank, 2, options)
                self._group.eager_connect_single_device(self._device)
                self._stream: Any = torch.cuda.Stream(  # type: ignore[no-untyped-call]
                    self._device, priority=HIGH_PRIORITY
                )
                # Not the one above, in which the next receive would wait for the reader of this one.
                self._readers: Any = torch.cuda.Stream(  # type: ignore[no-untyped-call]
                    self._device, priority=HIGH_PRIORITY
                )
        except RuntimeError as error:
            raise channel_lost(f"the NCCL group can't be made: {error}") from error

    def post_send(self, data: Tensor, after: Moved | None = None) -> Pending:
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                if after is not None:
                    after.hold_back(self._stream)
                self._group.send([data], 1 - self._rank, 0).wait()  # the stream waits, not this thread
                return self._used(data)
        except RuntimeError as error:
            raise channel_lost(f"sending failed: {error}") from error

    def post_receive(self, slot: Tensor, num_bytes: int) -> Incoming:
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                self._group.recv([slot[:num_bytes]], 1 - self._rank, 0).wait()
                slot.record_stream(self._stream)
                return ArrivalEvent(self._device, self._readers)
        except RuntimeError as error:
            raise channel_lost(f"receiving failed: {error}") from error

    def _used(self, data: Tensor) -> Pending:
        """A channel that breaks drops its slots at once: nobody gets their memory before this is done."""
        data.record_stream(self._stream)
        return DeviceEvent(self._device)

    def abort(self) -> None:
        self._group.abort()


def _keep_torch_from_ending_the_process() -> None:
    """torch's watchdog would, when a peer dies; deadlines and aborts are ours. torch reads these when a group
    is made; the last one spares us a warning that operations of one group are in one order, as they shall."""
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    os.environ["TORCH_NCCL_ENABLE_MONITORING"] = "0"
    os.environ["TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING"] = "0"


def _bind_nccl_to(host: str) -> None:
    """NCCL's bootstrap sockets take an interface, not an address. The operator's own choice stands."""
    if "NCCL_SOCKET_IFNAME" not in os.environ:
        os.environ.update(nccl_binding(host))
