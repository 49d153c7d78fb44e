"""The KV tensors of a CUDA device behind page ids, as hand-overs see them.

Pages move beside the steps, on streams with a high priority: a gather need not wait for the matmuls of the
step that runs, nor a decode step for a scatter. Gathers have a stream of their own; a scatter is queued in
its channel's, behind the bytes that it scatters. The digest goes to pinned memory, and nobody waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from phloem.kernels import ops
from phloem.shared.engine.models.kv_cache import KVCache
from phloem.shared.engine.page_store import layer_page_bytes
from phloem.shared.transfer.device_event import HIGH_PRIORITY, DeviceEvent
from phloem.shared.transfer.pending import Incoming, Moved

_USUAL_PAGE_COUNTS = (1, 16, 32, 64, 128, 256, 512, 1024)
_MOVES_UNDER_WAY = 8
_DIGEST_CELLS = 64  # over which the kernel's programs spread their sums
_NO_PAGE = -1

_Move: TypeAlias = Callable[[KVCache, Tensor, Tensor, int, int, Tensor, Tensor], None]


class CudaPageStore:
    """See `PageStore`. For the engine's thread only, whose current stream is the steps'."""

    def __init__(self, kv: KVCache, device: torch.device) -> None:
        self._kv = kv
        self._device = device
        self._addresses = ops.plane_addresses(kv)
        assert all(plane.data_ptr() % 16 == 0 for plane in (*kv.k, *kv.v)), (
            "the kernel reads 16 bytes at a time"
        )
        # Any: torch does not type its streams.
        self._stream: Any = torch.cuda.Stream(device, priority=HIGH_PRIORITY)  # type: ignore[no-untyped-call]
        self._latest_gather: _Moved | None = None
        self.num_layers = len(kv.k)
        self.layer_page_bytes = layer_page_bytes(kv)
        self._warm_up()

    def gather(self, page_ids: Sequence[int], layer_start: int, layer_end: int, out: Tensor) -> Moved:
        self._latest_gather = self._move(ops.gather_pages_async, page_ids, layer_start, layer_end, out)
        return self._latest_gather

    def scatter(
        self,
        page_ids: Sequence[int],
        layer_start: int,
        layer_end: int,
        data: Tensor,
        after: Incoming | None = None,
    ) -> Moved:
        return self._move(ops.scatter_pages_async, page_ids, layer_start, layer_end, data, after)

    def fence(self) -> None:
        if self._latest_gather is not None and not self._latest_gather.done():
            self._latest_gather.hold_back(torch.cuda.current_stream(self._device))

    def withdraw(self, scatters: Iterable[Moved]) -> None:
        for moved in scatters:
            assert isinstance(moved, _Moved)
            if moved.may_still_write():
                moved.hold_back(torch.cuda.current_stream(self._device))

    def _warm_up(self) -> None:
        """Compiles the kernels for the page counts that Triton tells apart, and has torch keep pinned memory
        for what is to come: both would hold up the first hand-overs. What is written to the pages was read
        from them."""
        pinned = [
            torch.empty(_DIGEST_CELLS + num_pages, dtype=torch.int64, pin_memory=True)
            for num_pages in _USUAL_PAGE_COUNTS
            for _ in range(_MOVES_UNDER_WAY)
        ]
        del pinned
        for num_pages in (1, 2, 16):
            if num_pages <= len(self._kv.k[0]):
                staging = torch.empty(
                    num_pages * self.layer_page_bytes, dtype=torch.uint8, device=self._device
                )
                self.gather(range(num_pages), 0, 1, staging)
                self.scatter(range(num_pages), 0, 1, staging)
                torch.cuda.synchronize(self._device)

    @torch.inference_mode()
    def _move(
        self,
        move: _Move,
        page_ids: Sequence[int],
        layer_start: int,
        layer_end: int,
        staging: Tensor,
        after: Incoming | None = None,
    ) -> _Moved:
        stream = self._stream if after is None else after.stream
        on_host = _digest_and_ids(page_ids)
        with torch.cuda.stream(stream):
            if after is not None:
                after.hold_back(stream)
            index = on_host.to(self._device, non_blocking=True)
            digest = index[:_DIGEST_CELLS]
            move(self._kv, self._addresses, index[_DIGEST_CELLS:], layer_start, layer_end, staging, digest)
            moved = DeviceEvent(self._device)
            on_host[:_DIGEST_CELLS].copy_(digest, non_blocking=True)
            # A channel that breaks drops its slots at once: nobody gets their memory before this is done.
            staging.record_stream(stream)
            return _Moved(moved, DeviceEvent(self._device), on_host, after)


def _digest_and_ids(page_ids: Sequence[int]) -> Tensor:
    """Pinned: what goes to the device, and whose first part comes back. The digest's cells stand before the
    ids, so that both always have the same alignment, which Triton compiles for."""
    on_host = torch.empty(_DIGEST_CELLS + len(page_ids), dtype=torch.int64, pin_memory=True)
    values = on_host.numpy()
    values[:_DIGEST_CELLS] = 0
    values[_DIGEST_CELLS:] = page_ids
    return on_host


class _Moved:
    """Holds the pinned digest and ids, `on_host`, until the device is done with them. `moved`: the pages are
    in their places; `told`: the digest is there too."""

    def __init__(
        self, moved: DeviceEvent, told: DeviceEvent, on_host: Tensor, after: Incoming | None
    ) -> None:
        self._moved = moved
        self._told = told
        self._on_host = on_host
        self._after = after

    def done(self) -> bool:
        return self._told.done()

    def wait(self, timeout_s: float) -> None:
        self._told.wait(timeout_s)

    def digest(self) -> int:
        return int(self._on_host[:_DIGEST_CELLS].sum())

    def hold_back(self, stream: torch.cuda.Stream) -> None:
        self._moved.hold_back(stream)

    def may_still_write(self) -> bool:
        """Takes the page ids back. The device reads them when the bytes have come: if they have not come by
        now, it will find none, and write nothing."""
        self._on_host.numpy()[_DIGEST_CELLS:] = _NO_PAGE
        return not self.done() and (self._after is None or self._after.done())
