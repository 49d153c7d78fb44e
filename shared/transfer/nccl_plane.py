"""A channel's bytes over NCCL, beside all streams of the engine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from phloem.shared.transfer.device_event import ArrivalEvent, RecordedEvent
from phloem.shared.transfer.errors import channel_lost
from phloem.shared.transfer.nccl_calls import NcclCalls
from phloem.shared.transfer.nccl_group import join_group
from phloem.shared.transfer.pending import Incoming, Moved, Pending
from phloem.shared.transfer.planes import RANKS, PlaneSpec
from phloem.shared.transfer.rendezvous import ControlStore

_ABORT_WAIT_S = 1.0  # for who is posting: it does so in some microseconds, or never


class NcclPlane:
    """See `DataPlane`. The receive must name exactly the bytes that the peer sends.

    All operations are in one stream; who reads what they bring has one of its own.
    """

    def __init__(self, spec: PlaneSpec, store: ControlStore) -> None:
        self._device = torch.device(spec.device)
        self._group = join_group(spec, store)
        with torch.cuda.device(self._device):
            self._calls = NcclCalls(self._group._comm_ptr(), 1 - RANKS[spec.side])
        take = spec.streams.take
        self._link, self._readers = take(self._device), take(self._device)
        self._posting_lock = threading.Lock()  # guards the next one, and the communicator
        self._aborted = False

    def post_send(self, data: Tensor, after: Moved | None = None) -> Pending:
        with self._posting():
            self._hold_back(after)
            self._calls.send(data, self._link)
            return RecordedEvent(self._end())

    def post_receive(self, slot: Tensor, num_bytes: int, after: Moved | None = None) -> Incoming:
        with self._posting():
            self._hold_back(after)
            self._calls.receive(slot[:num_bytes], self._link)
            return ArrivalEvent(self._end(), self._readers)

    def abort(self) -> None:
        got_it = self._posting_lock.acquire(timeout=_ABORT_WAIT_S)
        self._aborted = True
        try:
            self._group.abort()
        finally:
            if got_it:
                self._posting_lock.release()

    @contextmanager
    def _posting(self) -> Iterator[None]:
        with self._posting_lock, torch.cuda.device(self._device):
            if self._aborted:
                raise channel_lost("the channel is being taken apart")
            try:
                yield
            except RuntimeError as error:
                raise channel_lost(f"the device failed: {error}") from error

    def _hold_back(self, after: Moved | None) -> None:
        if after is not None and not after.done():
            after.hold_back(self._link)

    def _end(self) -> Any:
        """The event behind what was posted."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch does not type its events
        event.record(self._link)
        return event
