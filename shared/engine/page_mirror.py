"""What the device knows of the slots' page table, and what it lacks for the rows of a decode step. No torch.

Only what changed travels: pairs of (place, page id). A row that grew since the step before costs one pair; a
row that is new costs its pages once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from phloem.kernels.flashinfer_ops.page_lists import PagedRows


class PageMirror:
    """The page table on the device as it will be when what `changes` gave is there: `[num_slots, max_pages]`,
    page 0 everywhere at first."""

    def __init__(self, *, num_slots: int, max_pages: int, page_size: int) -> None:
        self._sent: npt.NDArray[np.int32] = np.zeros((num_slots, max_pages), dtype=np.int32)
        self._page_size = page_size

    def changes(self, rows: PagedRows) -> npt.NDArray[np.int32]:
        """Pairs (slot * max_pages + index of the page in its slot, page id), `[P, 2]`, that the device lacks
        of the rows' pages; it counts as having them from now on."""
        if rows.same_rows:
            # At most the page of this step's token is new, and only when it is the page's first.
            positions = rows.kv_lens - 1
            begun = np.flatnonzero(positions % self._page_size == 0)
            slots, columns = rows.slots[begun], positions[begun] // self._page_size
            changed = rows.page_table[slots, columns] != self._sent[slots, columns]
            slots, columns = slots[changed], columns[changed]
        else:
            num_pages = (rows.kv_lens + (self._page_size - 1)) // self._page_size
            width = int(num_pages.max())
            differs = rows.page_table[rows.slots, :width] != self._sent[rows.slots, :width]
            differs &= np.arange(width) < num_pages[:, None]
            at, columns = np.nonzero(differs)
            slots = rows.slots[at]
        pairs = np.empty((len(slots), 2), dtype=np.int32)
        if len(slots):
            pages = rows.page_table[slots, columns]
            pairs[:, 0], pairs[:, 1] = slots * self._sent.shape[1] + columns, pages
            self._sent[slots, columns] = pages
        return pairs
