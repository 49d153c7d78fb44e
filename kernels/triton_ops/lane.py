"""Plans for the Triton attention: sequences of a step on the device, in one copy from pinned memory.

device buffer (int64):  [ query_starts | kv_lens | page table, row by row ]
                          max_rows+1     max_rows  max_rows x max_pages
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from phloem.kernels.triton_ops.attention import paged_attention

Int64Array = npt.NDArray[np.int64]


class TritonPlan(NamedTuple):
    """A planned step: `attend` runs it for one layer, also inside a CUDA graph."""

    page_table: Tensor
    query_starts: Tensor
    kv_lens: Tensor
    max_query_len: int
    window: int

    def attend(self, q: Tensor, k_pages: Tensor, v_pages: Tensor, scale: float, out: Tensor) -> None:
        paged_attention(
            q,
            k_pages,
            v_pages,
            self.page_table,
            self.query_starts,
            self.kv_lens,
            self.max_query_len,
            scale,
            self.window,
            out=out,
        )


class TritonLane:
    """One kind of rows, with device buffers of its own, reused by every step (see `FlashInferLane`)."""

    def __init__(self, device: torch.device, *, window: int, max_rows: int, max_pages: int) -> None:
        self._window = window
        self._max_rows = max_rows
        self._max_pages = max_pages
        size = 2 * max_rows + 1 + max_rows * max_pages
        self._buffer = torch.zeros(size, dtype=torch.int64, device=device)
        self._pinned = [
            torch.zeros(size, dtype=torch.int64, pin_memory=device.type == "cuda") for _ in range(2)
        ]
        self._turn = 0

    def plan(self, query_lens: Int64Array, kv_lens: Int64Array, page_table: Int64Array) -> TritonPlan:
        """query_lens, kv_lens `[B]`; page_table `[B, n]` of page ids, n at most `max_pages`."""
        self._turn ^= 1
        rows, batch, width = self._max_rows, len(kv_lens), page_table.shape[1]
        host = self._pinned[self._turn].numpy()
        host[0] = 0
        np.cumsum(query_lens, out=host[1 : batch + 1])
        host[rows + 1 : rows + 1 + batch] = kv_lens
        table = host[2 * rows + 1 : 2 * rows + 1 + batch * self._max_pages].reshape(batch, self._max_pages)
        table[:, :width] = page_table
        end = 2 * rows + 1 + batch * self._max_pages
        self._buffer[:end].copy_(self._pinned[self._turn][:end], non_blocking=True)
        return TritonPlan(
            self._buffer[2 * rows + 1 : end].view(batch, self._max_pages),
            self._buffer[: batch + 1],
            self._buffer[rows + 1 : rows + 1 + batch],
            int(query_lens.max()),
            self._window,
        )
