"""What the decode kernels read besides a step's rows: the page table by slot, and who reads which keys."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from phloem.kernels import ops
from phloem.kernels.flashinfer_ops.page_lists import PagedRows
from phloem.kernels.triton_ops.key_shares import MANY, Sharing, make_items, num_items, share_size
from phloem.shared.engine.page_mirror import PageMirror

Int32Array = npt.NDArray[np.int32]


class DecodeTables:
    """`page_table` is int32 `[num_slots, max_pages]` on the device, at one address for good. `write` says
    what a step has to bring: it travels with the step's rows (`decode_upload.py`)."""

    def __init__(
        self,
        device: torch.device,
        *,
        num_slots: int,
        max_pages: int,
        page_size: int,
        num_kv_heads: int,
        sharing: Callable[[int], Sharing] | None = None,
    ) -> None:
        """`sharing` says how the keys of a step of so many rows are shared; None: always for many blocks."""
        self._mirror = PageMirror(num_slots=num_slots, max_pages=max_pages, page_size=page_size)
        self._num_kv_heads = num_kv_heads
        self._sharing = sharing or (lambda num_rows: MANY)
        self.page_table = torch.zeros((num_slots, max_pages), dtype=torch.int32, device=device)

    def num_items(self, num_rows: int) -> int:
        """Items of work of a step of so many rows."""
        return num_items(num_rows, self._num_kv_heads)

    def write(self, rows: PagedRows, work: Int32Array, pairs: Int32Array) -> int:
        """Fills `work` (`[num_items, FIELDS]`) and the beginning of `pairs` (`[capacity, 2]`), both on the
        host; returns the number of pairs. More than there is room for go at once, by themselves."""
        sharing = self._sharing(len(rows.kv_lens))
        make_items(rows.slots, rows.kv_lens, share_size(rows.kv_lens, self._num_kv_heads, sharing), work)
        changes = self._mirror.changes(rows)
        if len(changes) > len(pairs):
            self._place_now(changes)
            return 0
        pairs[: len(changes)] = changes
        return len(changes)

    def _place_now(self, changes: Int32Array) -> None:
        """When a large batch begins at once. torch's allocator keeps the pinned copy until it was read."""
        host = torch.from_numpy(changes)
        if self.page_table.is_cuda:
            host = host.pin_memory()
        pairs = host.to(self.page_table.device, non_blocking=True)
        count = torch.full((1,), len(changes), dtype=torch.int32, device=pairs.device)
        ops.place_pages(self.page_table, count, pairs)
