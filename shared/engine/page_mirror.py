"""The slots' page table on the device, kept equal to the host's for the rows of each decode step.

Only what changed travels: pairs of (place, page id), from pinned memory, ordered on the current stream. A row
that grew since the step before costs one pair; a row that is new costs its pages once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from phloem.kernels.flashinfer_ops.page_lists import PagedRows
from phloem.shared.engine.cuda_inputs import RING

_FIRST_PAIRS = 4096


class PageMirror:
    """`table` is int32 `[num_slots, max_pages]` on the device, at one address for good."""

    def __init__(self, device: torch.device, *, num_slots: int, max_pages: int, page_size: int) -> None:
        self.table = torch.zeros((num_slots, max_pages), dtype=torch.int32, device=device)
        self._sent: npt.NDArray[np.int32] = np.zeros((num_slots, max_pages), dtype=np.int32)
        self._page_size = page_size
        self._pinned = device.type == "cuda"
        self._turn = 0
        self._hosts = [self._buffer(_FIRST_PAIRS) for _ in range(RING)]

    def update(self, rows: PagedRows) -> None:
        """Sends what the device lacks of the rows' pages."""
        num_pages = (rows.kv_lens + (self._page_size - 1)) // self._page_size
        if rows.same_rows:
            # At most the page of this step's token is new.
            columns = num_pages - 1
            pages = rows.page_table[rows.slots, columns]
            changed = np.flatnonzero(pages != self._sent[rows.slots, columns])
            slots, columns = rows.slots[changed], columns[changed]
        else:
            width = int(num_pages.max())
            differs = rows.page_table[rows.slots, :width] != self._sent[rows.slots, :width]
            differs &= np.arange(width) < num_pages[:, None]
            at, columns = np.nonzero(differs)
            slots = rows.slots[at]
        if len(slots):
            self._send(slots * self.table.shape[1] + columns, rows.page_table[slots, columns])
            self._sent[slots, columns] = rows.page_table[slots, columns]

    def _send(
        self, places: npt.NDArray[np.int64], pages: npt.NDArray[np.int32] | npt.NDArray[np.int64]
    ) -> None:
        count = len(places)
        self._turn = (self._turn + 1) % RING
        if 2 * count > len(self._hosts[self._turn]):
            self._hosts[self._turn] = self._buffer(count)
        host = self._hosts[self._turn]
        array = host.numpy()
        array[:count], array[count : 2 * count] = places, pages
        pairs: Tensor = host[: 2 * count].to(self.table.device, non_blocking=True)
        self.table.view(-1).index_copy_(0, pairs[:count], pairs[count:].to(torch.int32))

    def _buffer(self, num_pairs: int) -> Tensor:
        return torch.zeros(2 * num_pairs, dtype=torch.int64, pin_memory=self._pinned)
