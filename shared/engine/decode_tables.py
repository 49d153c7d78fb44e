"""What the decode kernels read besides a step's rows: the page table by slot, and who reads which keys."""

from __future__ import annotations

import torch
from torch import Tensor

from phloem.kernels.flashinfer_ops.page_lists import PagedRows
from phloem.kernels.triton_ops.key_shares import num_items, share_keys
from phloem.shared.engine.cuda_inputs import RING
from phloem.shared.engine.page_mirror import PageMirror


class DecodeTables:
    """On the device, at addresses that stay; `update` before each step, ordered on the current stream."""

    def __init__(self, pages: PageMirror, device: torch.device, *, max_rows: int, num_kv_heads: int) -> None:
        self._pages = pages
        self._num_kv_heads = num_kv_heads
        size = self._work_size(max_rows)
        self._work = torch.zeros(size, dtype=torch.int32, device=device)
        pinned = device.type == "cuda"
        self._hosts = [torch.zeros(size, dtype=torch.int32, pin_memory=pinned) for _ in range(RING)]
        self._turn = 0

    @property
    def page_table(self) -> Tensor:
        return self._pages.table

    def work(self, num_rows: int) -> Tensor:
        """The view that a step of so many rows reads."""
        return self._work[: self._work_size(num_rows)]

    def update(self, rows: PagedRows) -> None:
        self._pages.update(rows)
        self._turn = (self._turn + 1) % RING
        size = self._work_size(len(rows.kv_lens))
        host = self._hosts[self._turn][:size]
        host.numpy()[:] = share_keys(rows.kv_lens, self._num_kv_heads)
        self._work[:size].copy_(host, non_blocking=True)

    def _work_size(self, num_rows: int) -> int:
        return 1 + num_rows + num_items(num_rows, self._num_kv_heads)
