"""The KV tensors of a CUDA device behind page ids, as hand-overs see them.

Pages move on a stream of their own with a high priority: a gather need not wait for the matmuls of the step
that runs, nor a decode step for a scatter. The digest goes to pinned memory, and nobody waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from phloem.kernels import ops
from phloem.shared.engine.models.kv_cache import KVCache
from phloem.shared.engine.page_store import layer_page_bytes
from phloem.shared.transfer.device_event import HIGH_PRIORITY, DeviceEvent
from phloem.shared.transfer.pending import Moved

_USUAL_PAGE_COUNTS = (1, 16, 32, 64, 128, 256, 512, 1024)
_MOVES_UNDER_WAY = 8


class CudaPageStore:
    """See `PageStore`. For the engine's thread only, whose current stream is the steps'."""

    def __init__(self, kv: KVCache, device: torch.device) -> None:
        self._kv = kv
        self._device = device
        self._addresses = ops.plane_addresses(kv)
        # Any: torch does not type its streams.
        self._stream: Any = torch.cuda.Stream(device, priority=HIGH_PRIORITY)  # type: ignore[no-untyped-call]
        self._latest: DeviceEvent | None = None
        self.num_layers = len(kv.k)
        self.layer_page_bytes = layer_page_bytes(kv)
        self._warm_up()

    def gather(self, page_ids: Sequence[int], layer_start: int, layer_end: int, out: Tensor) -> Moved:
        return self._move(ops.gather_pages_async, page_ids, layer_start, layer_end, out)

    def scatter(self, page_ids: Sequence[int], layer_start: int, layer_end: int, data: Tensor) -> Moved:
        return self._move(ops.scatter_pages_async, page_ids, layer_start, layer_end, data)

    def fence(self) -> None:
        if self._latest is not None and not self._latest.done():
            self._latest.hold_back(torch.cuda.current_stream(self._device))

    def _warm_up(self) -> None:
        """Compiles the kernels for the page counts that Triton tells apart, and has torch keep pinned memory
        for what is to come: both would hold up the first hand-overs. What is written to the pages was read
        from them."""
        pinned = [
            torch.empty(1 + num_pages, dtype=torch.int64, pin_memory=True)
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
        move: Callable[[KVCache, Tensor, Tensor, int, int, Tensor, Tensor], None],
        page_ids: Sequence[int],
        layer_start: int,
        layer_end: int,
        staging: Tensor,
    ) -> Moved:
        # The digest, zero at first, travels with the ids: there, and back. It stands before them, so that
        # both always have the same alignment, which Triton compiles for.
        on_host = torch.tensor((0, *page_ids), dtype=torch.int64, pin_memory=True)
        with torch.cuda.stream(self._stream):
            index = on_host.to(self._device, non_blocking=True)
            digest = index[:1]
            move(self._kv, self._addresses, index[1:], layer_start, layer_end, staging, digest)
            on_host[:1].copy_(digest, non_blocking=True)
            # A channel that breaks drops its slots at once: nobody gets their memory before this is done.
            staging.record_stream(self._stream)
            self._latest = DeviceEvent(self._device)
        return _Moved(self._latest, on_host)


class _Moved:
    """Holds the pinned digest, the first of `on_host`, until it is read."""

    def __init__(self, event: DeviceEvent, on_host: Tensor) -> None:
        self._event = event
        self._on_host = on_host

    def done(self) -> bool:
        return self._event.done()

    def wait(self, timeout_s: float) -> None:
        self._event.wait(timeout_s)

    def digest(self) -> int:
        return int(self._on_host[0])

    def hold_back(self, stream: torch.cuda.Stream) -> None:
        self._event.hold_back(stream)
