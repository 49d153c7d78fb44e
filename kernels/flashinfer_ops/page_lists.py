"""The ragged lists of pages that FlashInfer reads: kept on the host, sent to the device. No FlashInfer here.

From one decode step to the next, most rows stay on the pages they have: then only the header is written and
sent. Where rows got pages, the lists are copied around the new ones; they are gathered from the page table
only for rows that were not there before.

    device buffer (int32):  [ qo_indptr | kv_indptr | last_page_len ][ page ids, row by row ... ]
                              max_rows+1  max_rows+1  max_rows         max_indices

Everything is sent from pinned memory and never waited for. Pinned buffers take turns in pairs: step N + 1 is
planned while step N runs, never while N - 1 does.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IntArray = npt.NDArray[np.int32] | npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

_EMPTY = np.zeros(0, dtype=np.int64)


class PagedRows(NamedTuple):
    """Rows of one step. page_table `[num_slots, max_pages]` of page ids; slots, query_lens and kv_lens int64
    `[B]`: kv_lens counts this step's tokens too.

    `same_rows`: slots and query_lens are those of the plan before, and no page of a row has changed; rows may
    have got pages behind those they had.
    """

    page_table: IntArray
    slots: Int64Array
    query_lens: Int64Array
    kv_lens: Int64Array
    same_rows: bool = False


class PageLists:
    """`update` for each step; then qo_indptr, kv_indptr (int32 `[B + 1]`) and kv_lens (int32 `[B]`) describe
    it on the host, and `device_*` on the device, as soon as the current stream gets there."""

    def __init__(self, device: torch.device, *, page_size: int, max_rows: int, max_indices: int) -> None:
        pinned = device.type == "cuda"
        self._page_size = page_size
        self._max_rows = max_rows
        self._header = 3 * max_rows + 2
        self._buffer = torch.zeros(self._header + max_indices, dtype=torch.int32, device=device)
        self._headers, self._lists = (
            [torch.zeros(size, dtype=torch.int32, pin_memory=pinned) for _ in range(2)]
            for size in (self._header, max_indices)
        )
        self._turn = 0
        self._lists_turn = 0
        self._num_pages = _EMPTY  # of each row
        self.qo_indptr: Int32Array = np.zeros(1, dtype=np.int32)
        self.kv_indptr: Int32Array = np.zeros(1, dtype=np.int32)
        self.kv_lens: Int32Array = np.zeros(0, dtype=np.int32)

    def update(self, rows: PagedRows) -> bool:
        """Takes a step's rows and sends what changed. Whether `qo_indptr` or `kv_indptr` did."""
        num_pages = (rows.kv_lens + (self._page_size - 1)) // self._page_size
        self.kv_lens = rows.kv_lens.astype(np.int32)
        if not rows.same_rows:
            self.qo_indptr = _indptr(rows.query_lens)
            self._gather(rows, num_pages)
            changed = True
        else:
            grown = np.flatnonzero(num_pages != self._num_pages)
            changed = len(grown) > 0
            if changed:
                self._insert(rows, num_pages, grown)
        self._send_header(len(rows.kv_lens))
        return changed

    @property
    def device_qo_indptr(self) -> Tensor:
        return self._buffer[: len(self.kv_lens) + 1]

    @property
    def device_kv_indptr(self) -> Tensor:
        start = self._max_rows + 1
        return self._buffer[start : start + len(self.kv_lens) + 1]

    @property
    def device_last_page_len(self) -> Tensor:
        start = 2 * self._max_rows + 2
        return self._buffer[start : start + len(self.kv_lens)]

    @property
    def device_indices(self) -> Tensor:
        """All of the buffer: a graph may be captured with fewer pages than it is replayed with."""
        return self._buffer[self._header :]

    # -- inside ----------------------------------------------------------------------------------------

    def _gather(self, rows: PagedRows, num_pages: Int64Array) -> None:
        """All rows' pages from the page table."""
        width = int(num_pages.max())
        used = np.arange(width) < num_pages[:, None]
        out = self._next_lists()
        self.kv_indptr = _indptr(num_pages)
        out[: self.kv_indptr[-1]] = rows.page_table[rows.slots, :width][used]
        self._num_pages = num_pages
        self._send_lists()

    def _insert(self, rows: PagedRows, num_pages: Int64Array, grown: Int64Array) -> None:
        """The old lists with the new pages of the grown rows behind the pages that those had."""
        old, old_indptr = self._lists[self._lists_turn].numpy(), self.kv_indptr
        out = self._next_lists()
        self.kv_indptr = _indptr(num_pages)
        taken = filled = 0  # of the old lists, of the new ones
        for row in grown.tolist():
            upto = int(old_indptr[row + 1])
            out[filled : filled + upto - taken] = old[taken:upto]
            filled, taken = filled + upto - taken, upto
            end = int(self.kv_indptr[row + 1])
            first, last = int(self._num_pages[row]), int(num_pages[row])
            out[filled:end] = rows.page_table[rows.slots[row], first:last]
            filled = end
        out[filled : self.kv_indptr[-1]] = old[taken : old_indptr[-1]]
        self._num_pages = num_pages
        self._send_lists()

    def _next_lists(self) -> Int32Array:
        self._lists_turn ^= 1
        out: Int32Array = self._lists[self._lists_turn].numpy()
        return out

    def _send_lists(self) -> None:
        count = int(self.kv_indptr[-1])
        target = self._buffer[self._header : self._header + count]
        target.copy_(self._lists[self._lists_turn][:count], non_blocking=True)

    def _send_header(self, batch: int) -> None:
        self._turn ^= 1
        host, rows = self._headers[self._turn].numpy(), self._max_rows
        host[: batch + 1] = self.qo_indptr
        host[rows + 1 : rows + 2 + batch] = self.kv_indptr
        host[2 * rows + 2 : 2 * rows + 2 + batch] = (self.kv_lens - 1) % self._page_size + 1
        self._buffer[: self._header].copy_(self._headers[self._turn], non_blocking=True)


def _indptr(lengths: Int64Array) -> Int32Array:
    out = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=out[1:])
    return out
