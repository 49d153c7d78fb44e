"""The KV tensors of a CUDA device behind page ids, as hand-overs see them.

Pages move beside the steps, on streams with a high priority: a gather need not wait for the matmuls of the
step that runs, nor a decode step for a scatter. Gathers have a stream of their own; a scatter is queued in
its channel's, behind the bytes that it scatters. The digest goes to pinned memory, and nobody waits for it.

A call costs the host a launch and an event, for which it keeps the interpreter (`kernels.cuda_driver`). There
are no tensor operations, and what a move needs (a `_Lane`) is used again. That it is over is read from pinned
memory, where its digest is then.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from phloem.kernels import ops
from phloem.kernels.cuda_driver import CudaDriver, CudaEvent, cuda_driver
from phloem.kernels.triton_ops.pages import PageMover
from phloem.shared.engine.models.kv_cache import KVCache
from phloem.shared.engine.page_store import layer_page_bytes
from phloem.shared.transfer.device_event import HIGH_PRIORITY, RecordedEvent
from phloem.shared.transfer.errors import channel_lost
from phloem.shared.transfer.pending import Incoming, Moved

_MOVES_UNDER_WAY = 24  # as a rule; more cost an allocation each
_USUAL_PAGES = 2048  # of one move: 128 MiB of single layers
_IDS_AT = 8  # words: page ids begin where a cache line does, behind the digest
_NO_PAGE = -1
_UNTOLD = -0x5E11_1A57_0B5E_55ED  # where a digest will be; one that happens to equal it waits for the event


class CudaPageStore:
    """See `PageStore`. For the engine's thread only, whose current stream is the steps'."""

    def __init__(self, kv: KVCache, device: torch.device) -> None:
        self._kv = kv
        self._device = device
        # Any: torch does not type its streams.
        self._stream: Any = torch.cuda.Stream(device, priority=HIGH_PRIORITY)  # type: ignore[no-untyped-call]
        self._latest_gather: _Moved | None = None
        self._withdrawn: list[_Moved] = []  # which write to pages that may be others' by now
        self.num_layers = len(kv.k)
        self.layer_page_bytes = layer_page_bytes(kv)
        with torch.cuda.device(device):
            self._driver = cuda_driver(torch.cuda.current_device())
            self._mover = PageMover(kv, ops.plane_addresses(kv), self._driver)
            # All of them: one that became garbage would share its event with whoever gets that next.
            self._lanes: list[_Lane] = []
            self._free: deque[_Lane] = deque(self._new_lane(_USUAL_PAGES) for _ in range(_MOVES_UNDER_WAY))
            self._warm_up()

    def gather(
        self, page_ids: Sequence[int], layer_start: int, layer_end: int, out: Tensor, beside: int = 0
    ) -> Moved:
        layers = (layer_start, layer_end)
        self._latest_gather = self._move(True, page_ids, layers, out, self._stream, None, beside)
        return self._latest_gather

    def scatter(
        self,
        page_ids: Sequence[int],
        layer_start: int,
        layer_end: int,
        data: Tensor,
        after: Incoming | None = None,
        beside: int = 0,
    ) -> Moved:
        stream = self._stream if after is None else after.stream
        self._let_others_finish(stream)
        return self._move(False, page_ids, (layer_start, layer_end), data, stream, after, beside)

    def fence(self) -> None:
        if self._latest_gather is not None and not self._latest_gather.done():
            self._latest_gather.hold_back(torch.cuda.current_stream(self._device))

    def withdraw(self, scatters: Iterable[Moved]) -> None:
        for moved in scatters:
            assert isinstance(moved, _Moved)
            if moved.may_still_write():
                moved.hold_back(torch.cuda.current_stream(self._device))
                self._withdrawn.append(moved)

    def _let_others_finish(self, stream: Any) -> None:  # torch does not type its streams
        """The pages of the scatter that comes next may have been given away with something still on the move,
        for which only the steps wait; none of that waits for a peer."""
        self._withdrawn = [moved for moved in self._withdrawn if not moved.done()]
        for moved in self._withdrawn:
            moved.hold_back(stream)
        if self._latest_gather is not None and not self._latest_gather.done():
            self._latest_gather.hold_back(stream)

    def _warm_up(self) -> None:
        """The device loads a kernel when it is launched first, which would hold up the first hand-over. What
        is written to the page was read from it."""
        staging = torch.empty(self.layer_page_bytes, dtype=torch.uint8, device=self._device)
        torch.cuda.synchronize()
        self.gather([0], 0, 1, staging)
        self.scatter([0], 0, 1, staging)
        torch.cuda.synchronize()
        self._latest_gather = None

    def _move(
        self,
        gathers: bool,
        page_ids: Sequence[int],
        layers: tuple[int, int],
        staging: Tensor,
        stream: Any,  # torch does not type its streams
        after: Incoming | None,
        beside: int,
    ) -> _Moved:
        num_pages = len(page_ids)
        num_bytes = num_pages * (layers[1] - layers[0]) * self.layer_page_bytes
        assert num_bytes <= staging.numel(), "the kernel does not know where the slot ends"
        address = staging.data_ptr()
        assert address % 16 == 0, "the kernel reads 16 bytes at a time"
        lane = self._take_lane(num_pages, stream)
        struct.pack_into(f"{num_pages}q", lane.words, 8 * _IDS_AT, *page_ids)
        lane.staging = staging
        lane.told[0] = _UNTOLD
        if after is not None:
            after.hold_back(stream)
        self._mover.move(
            gathers, lane.arguments, num_pages, layers, address, stream.cuda_stream, beside / num_bytes
        )
        lane.event.record(stream)
        lane.is_over = False
        return _Moved(lane, after, self._free)

    def _take_lane(self, num_pages: int, stream: Any) -> _Lane:
        """The one that was given back first, if the device is done with it."""
        for _ in range(len(self._free)):
            lane = self._free.popleft()
            if lane.num_pages >= num_pages and lane.sees_its_end():
                return lane
            self._free.append(lane)
        with torch.cuda.stream(stream):  # where its cells are cleared, before the move
            return self._new_lane(max(_USUAL_PAGES, num_pages))

    def _new_lane(self, num_pages: int) -> _Lane:
        self._lanes.append(lane := _Lane(self._mover, num_pages, self._driver))
        return lane


class _Lane:
    """What one move at a time needs: pinned memory `on_host` for [digest, .., page ids], which the device
    reads and writes where it is, cells for the digest, and the event behind it."""

    def __init__(self, mover: PageMover, num_pages: int, driver: CudaDriver) -> None:
        self.num_pages = num_pages
        self.on_host = torch.zeros(_IDS_AT + num_pages, dtype=torch.int64, pin_memory=True)
        self.ids = self.on_host.numpy()[_IDS_AT:]
        # Python's own views: to read or write an element of an array makes an object of numpy's.
        self.words = self.on_host.numpy().data
        self.told = self.words[:1]
        self.cells = mover.new_cells()
        told = self.on_host.data_ptr()
        self.arguments = mover.new_arguments(told + 8 * _IDS_AT, self.cells.data_ptr(), told)
        self.event = CudaEvent(driver)
        self.is_over = True  # seen to be; otherwise the digest or the event tells
        self.staging: Tensor | None = None  # kept until the device is done with it

    def sees_its_end(self) -> bool:
        """Of the latest move. Raises `RuntimeError` when the device failed."""
        self.is_over = self.is_over or self.told[0] != _UNTOLD or self.event.query()
        return self.is_over


class _Moved(RecordedEvent):
    """A move, which has its lane for as long as somebody holds it; then `free` gets it back."""

    def __init__(self, lane: _Lane, after: Incoming | None, free: deque[_Lane]) -> None:
        super().__init__(lane.event)
        self._lane = lane
        self._after = after
        self._free = free

    def __del__(self) -> None:
        self._free.append(self._lane)  # from any thread

    def done(self) -> bool:
        try:
            return self._lane.sees_its_end()
        except RuntimeError as error:
            raise channel_lost(f"the device failed: {error}") from error

    def digest(self) -> int:
        return self._lane.told[0]

    def may_still_write(self) -> bool:
        """Takes the page ids back. The device reads them when the bytes have come: if they have not come by
        now, it will find none, and write nothing."""
        self._lane.ids[:] = _NO_PAGE
        return not self.done() and (self._after is None or self._after.done())
