"""What the decode kernels read besides a step's rows: the page table by slot, and who reads which keys."""

from __future__ import annotations

import torch
from torch import Tensor

from phloem.kernels.flashinfer_ops.page_lists import PagedRows
from phloem.kernels.triton_ops.key_shares import FIELDS, make_items, num_items, share_size
from phloem.shared.engine.cuda_inputs import RING
from phloem.shared.engine.page_mirror import PageMirror


class DecodeTables:
    """On the device, at addresses that stay; `update` before each step, ordered on the current stream."""

    def __init__(self, pages: PageMirror, device: torch.device, *, max_rows: int, num_kv_heads: int) -> None:
        self._pages = pages
        self._num_kv_heads = num_kv_heads
        shape = (num_items(max_rows, num_kv_heads), FIELDS)
        self._work = torch.zeros(shape, dtype=torch.int32, device=device)
        pinned = device.type == "cuda"
        self._hosts = [torch.zeros(shape, dtype=torch.int32, pin_memory=pinned) for _ in range(RING)]
        self._turn = 0

    @property
    def page_table(self) -> Tensor:
        return self._pages.table

    def work(self, num_rows: int) -> Tensor:
        """The items of a step of so many rows, int32 `[num_items, FIELDS]`."""
        return self._work[: num_items(num_rows, self._num_kv_heads)]

    def update(self, rows: PagedRows) -> None:
        self._pages.update(rows)
        self._turn = (self._turn + 1) % RING
        work = self.work(len(rows.kv_lens))
        host = self._hosts[self._turn][: len(work)]
        make_items(rows.slots, rows.kv_lens, share_size(rows.kv_lens, self._num_kv_heads), host.numpy())
        work.copy_(host, non_blocking=True)
