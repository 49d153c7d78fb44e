"""A channel's bytes over NCCL, beside all streams of the engine."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from phloem.kernels.cuda_driver import CudaEvent, cuda_driver
from phloem.shared.transfer.config import COMMUNICATOR_CTAS
from phloem.shared.transfer.device_event import ArrivalEvent, PostedEvent
from phloem.shared.transfer.errors import channel_lost
from phloem.shared.transfer.nccl_calls import NcclCalls
from phloem.shared.transfer.nccl_group import join_group
from phloem.shared.transfer.pending import Incoming, Moved, Pending
from phloem.shared.transfer.planes import RANKS, PlaneSpec
from phloem.shared.transfer.rendezvous import ControlStore

if TYPE_CHECKING:
    from torch.cuda import Stream

log = logging.getLogger(__name__)

_LONG_ABORT_S = 1.0
_ABORT_WAIT_S = 1.0  # for who is posting: it does so in some microseconds, or never


class NcclPlane:
    """See `DataPlane`. The receive must name exactly the bytes that the peer sends.

    All operations are in one stream; who reads what they bring has one of its own.
    """

    runs_ahead = True

    def __init__(self, spec: PlaneSpec, store: ControlStore) -> None:
        device = torch.device(spec.device)
        with torch.cuda.device(device):
            self._driver = cuda_driver(torch.cuda.current_device())
        with self._driver.giving_way(spec.opening_timeout_s):
            self._group = join_group(spec, store, COMMUNICATOR_CTAS * spec.max_ctas)
        self._posting = threading.Lock()  # of who uses the communicator
        self._aborted = False  # set without the lock: who gets that after has seen it
        self._traffic, self._lane = spec.traffic, spec.traffic.enter()
        self._longest_s = spec.longest_s
        try:
            with torch.cuda.device(device):
                communicator = self._group._comm_ptr()
                self._calls = NcclCalls(
                    communicator, 1 - RANKS[spec.side], self._driver, spec.opening_timeout_s
                )
            self._link, self._readers = spec.streams.take(device), spec.streams.take(device)
        except BaseException:
            self.abort()
            raise

    def post_send(self, data: Tensor, after: Moved | None = None, num_bytes: int | None = None) -> Pending:
        num_bytes = data.numel() if num_bytes is None else num_bytes
        return PostedEvent(self._post(self._calls.send, data, num_bytes, after), self._driver)

    def post_receive(self, slot: Tensor, num_bytes: int, after: Moved | None = None) -> Incoming:
        event = self._post(self._calls.receive, slot, num_bytes, after)
        return ArrivalEvent(event, self._driver, self._readers)

    def abort(self) -> None:
        """Returns when NCCL has let go of everything: before, nobody else may have the staging memory. Who
        comes to post meanwhile, as the engine's thread, is refused at once."""
        self._aborted = True
        if self._posting.acquire(timeout=_ABORT_WAIT_S):
            self._posting.release()
        self._traffic.leave(self._lane)
        self._traffic.settle(self._longest_s)
        began = time.monotonic()
        try:
            with self._driver.giving_way():
                self._group.abort()
        finally:
            if (took_s := time.monotonic() - began) > _LONG_ABORT_S:
                log.warning("NCCL took %.1f s to give a channel up", took_s)

    def _post(
        self, call: Callable[[Tensor, int, Stream], None], data: Tensor, num_bytes: int, after: Moved | None
    ) -> CudaEvent:
        """The event behind what was posted."""
        with self._posting:
            if self._aborted:
                raise channel_lost("the channel is being taken apart")
            try:
                if after is not None:
                    after.hold_back(self._link)
                call(data, num_bytes, self._link)
                event = CudaEvent(self._driver)
                event.record(self._link)
                self._lane.newest = event
            except RuntimeError as error:
                raise channel_lost(f"the device failed: {error}") from error
            return event
