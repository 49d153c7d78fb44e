"""A channel's bytes over NCCL, beside all streams of the engine."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroupNCCL

from phloem.shared.transfer.config import NVLINK_CHUNK_BYTES
from phloem.shared.transfer.device_event import ArrivalEvent, RecordedEvent
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
        _prepare_torch()
        _prepare_nccl()
        _bind_nccl_to(spec.host)
        self._device = torch.device(spec.device)
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
                # What an operation waits for, what waits for it, and who reads what it brought: in one stream
                # the next operation would wait for all of that of this one.
                take = spec.streams.take
                self._before, self._behind, self._readers = (take(self._device) for _ in range(3))
        except RuntimeError as error:
            raise channel_lost(f"the NCCL group can't be made: {error}") from error

    def post_send(self, data: Tensor, after: Moved | None = None) -> Pending:
        try:
            with torch.cuda.stream(self._before):
                if after is not None:
                    after.hold_back(self._before)
                work = self._group.send([data], 1 - self._rank, 0)
            return RecordedEvent(self._end_of(work, data))
        except RuntimeError as error:
            raise channel_lost(f"sending failed: {error}") from error

    def post_receive(self, slot: Tensor, num_bytes: int) -> Incoming:
        try:
            with torch.cuda.stream(self._before):
                work = self._group.recv([slot[:num_bytes]], 1 - self._rank, 0)
            return ArrivalEvent(self._end_of(work, slot), self._readers)
        except RuntimeError as error:
            raise channel_lost(f"receiving failed: {error}") from error

    def _end_of(self, work: Any, data: Tensor) -> Any:
        """The event behind what was posted. A channel that breaks drops its slots at once: nobody gets their
        memory before it has come."""
        with torch.cuda.stream(self._behind):
            work.wait()  # the stream waits, not this thread
        data.record_stream(self._behind)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch does not type its events
        event.record(self._behind)
        return event

    def abort(self) -> None:
        self._group.abort()


def _prepare_torch() -> None:
    """torch's watchdog would end the process when a peer dies; deadlines and aborts are ours. Nor do we need
    the warning that operations of one group are in one order, as they shall, or a stack trace of every
    operation, for which torch waits for the interpreter in the middle of posting it. torch reads these when a
    group is made, the last one when the first group is."""
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    os.environ["TORCH_NCCL_ENABLE_MONITORING"] = "0"
    os.environ["TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING"] = "0"
    os.environ["TORCH_FR_BUFFER_SIZE"] = "0"


def _prepare_nccl() -> None:
    """NCCL gives a message between two ranks half of its CTAs, and all of them when 32 chunks are not enough
    for each of that half: with its own chunks of 512 KiB, 128 MiB crossed at 257 GB/s, 256 MiB at 352
    (measured, 16 CTAs). Both ranks must have the same chunks; the operator's own choice stands."""
    os.environ.setdefault("NCCL_P2P_NVL_CHUNKSIZE", str(NVLINK_CHUNK_BYTES))


def _bind_nccl_to(host: str) -> None:
    """NCCL's bootstrap sockets take an interface, not an address. The operator's own choice stands."""
    if "NCCL_SOCKET_IFNAME" not in os.environ:
        os.environ.update(nccl_binding(host))
