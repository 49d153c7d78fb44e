"""Host side of the slots: one row of each array per slot."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from phloem.shared.engine.requests import Request


class SlotTable:
    """page_ids int32 `[num_slots, max_pages]`, sampling parameters `[num_slots]`."""

    def __init__(self, num_slots: int, max_pages: int) -> None:
        self.page_ids: npt.NDArray[np.int32] = np.zeros((num_slots, max_pages), dtype=np.int32)
        self.temperature = np.ones(num_slots, dtype=np.float32)
        self.top_k = np.zeros(num_slots, dtype=np.int64)
        self.top_p = np.ones(num_slots, dtype=np.float32)
        self.min_p = np.zeros(num_slots, dtype=np.float32)
        self.seed = np.zeros(num_slots, dtype=np.int64)

    def bind(self, request: Request) -> None:
        """Brings the request's slot up to date: all of it the first time, then only new pages."""
        slot = request.slot
        first = request.num_bound_pages
        if first < 0:
            sampling = request.sampling
            self.temperature[slot] = sampling.temperature
            self.top_k[slot] = sampling.top_k
            self.top_p[slot] = sampling.top_p
            self.min_p[slot] = sampling.min_p
            self.seed[slot] = sampling.seed
            first = 0
        count = len(request.page_ids)
        if count > first:
            self.page_ids[slot, first:count] = request.page_ids[first:]
        request.num_bound_pages = count

    def write_index(
        self, slots: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], page_size: int
    ) -> npt.NDArray[np.int64]:
        """Where the K and V of the tokens at `positions` go: page id * page_size + offset, int64 `[n]`."""
        pages = self.page_ids[slots, positions // page_size].astype(np.int64)
        return pages * page_size + positions % page_size
