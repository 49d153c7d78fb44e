"""KV pages to and from a flat staging buffer, with the digest of `reference/pages.py` in the same pass."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from phloem.kernels.reference.pages import COLUMN_STEP, ROW_STEP, ROW_WORDS
from phloem.kernels.types import PagedKV

_MAX_BLOCK_WORDS = 1024
_DIGEST_CELLS = 64


@triton.jit(do_not_specialize=["num_pages"])  # one kernel for all lengths: nobody waits for a compiler
def _move_kernel(
    planes,
    page_ids,
    staging,
    digest,
    num_pages,
    page_words,
    digest_cells,
    row_words: tl.constexpr,
    row_step: tl.constexpr,
    column_step: tl.constexpr,
    gathers: tl.constexpr,
    block: tl.constexpr,
):
    page = tl.program_id(0)
    plane = tl.program_id(1)
    page_id = tl.load(page_ids + page)
    # Planes lie as torch allocates them: 16 bytes are read and written at a time.
    base = tl.multiple_of(tl.load(planes + plane).to(tl.pointer_type(tl.int64)), 16)
    pages = base + page_id * page_words
    # Places in staging fit into 32 bits (16 GiB), which a GPU computes in one instruction.
    first = (plane * num_pages + page) * page_words
    staged = staging + first
    total = tl.zeros([block], dtype=tl.int64)
    for start in range(0, page_words, block):
        word = start + tl.arange(0, block)
        inside = word < page_words
        if gathers:
            value = tl.load(pages + word, mask=inside, other=0)
            tl.store(staged + word, value, mask=inside)
        else:
            value = tl.load(staged + word, mask=inside, other=0)
            tl.store(pages + word, value, mask=inside & (page_id >= 0))
        place = first + word
        row_weight = ((place // row_words).to(tl.int64) * row_step) | 1
        column_weight = ((place % row_words).to(tl.int64) * column_step) | 1
        total += value * row_weight * column_weight
    # Nobody reads the sum before the kernel's end: without "relaxed" each program would wait until all that
    # it wrote is in memory, and without cells all would queue for one address.
    cell = (plane * num_pages + page) % digest_cells
    tl.atomic_add(digest + cell, tl.sum(total, axis=0), sem="relaxed")


@triton.jit
def _tell_kernel(digest, told, digest_cells: tl.constexpr):
    """Stores the sum of the cells in `told`, and clears them for the next move."""
    cells = digest + tl.arange(0, digest_cells)
    tl.store(told, tl.sum(tl.load(cells), axis=0))
    tl.store(cells, tl.zeros([digest_cells], dtype=tl.int64))


class PageMover:
    """Moves pages of one KV pool on a CUDA device with as little work for the host as may be: the kernels are
    compiled here, and launched without a look at their arguments, which are addresses."""

    def __init__(self, kv: PagedKV, addresses: Tensor) -> None:
        """`addresses` (`ops.plane_addresses`) are kept."""
        page_bytes = kv.k[0].stride(0) * kv.k[0].element_size()
        assert page_bytes % 8 == 0, "a page is whole 8-byte words"
        assert all(plane.data_ptr() % 16 == 0 for plane in (*kv.k, *kv.v)), (
            "the kernel reads 16 bytes at a time"
        )
        self._planes = addresses
        self._first_plane: int = addresses.data_ptr()
        self._page_words = page_bytes // 8
        block, num_warps = _block(self._page_words)
        self._constants = (ROW_WORDS, ROW_STEP, COLUMN_STEP)
        self._block = block
        cells = self.new_cells()
        common = (addresses, cells, cells, cells, 1, self._page_words, _DIGEST_CELLS, *self._constants)
        # Any: triton does not type its kernels.
        self._gather: Any = _move_kernel.warmup(*common, True, block, grid=(1,), num_warps=num_warps)
        self._scatter: Any = _move_kernel.warmup(*common, False, block, grid=(1,), num_warps=num_warps)
        self._tell: Any = _tell_kernel.warmup(cells, cells, _DIGEST_CELLS, grid=(1,), num_warps=1)

    def new_cells(self) -> Tensor:
        """Cleared cells for the digest of one move at a time."""
        return torch.zeros(_DIGEST_CELLS, dtype=torch.int64, device=self._planes.device)

    def move(
        self,
        gathers: bool,
        page_ids: int,
        num_pages: int,
        layers: tuple[int, int],
        staging: int,
        cells: int,
        told: int,
        stream: int,
    ) -> None:
        """Launches, in `stream`, what `gather_pages` or `scatter_pages` do. Everything else is an address, a
        multiple of 16: of `num_pages` int64 page ids and of the int64 where the digest will be, both maybe in
        pinned memory, of staging, and of cells that no other move uses until this one is over."""
        layer_start, layer_end = layers
        kernel = self._gather if gathers else self._scatter
        kernel[(num_pages, 2 * (layer_end - layer_start), 1)](
            self._first_plane + 16 * layer_start,
            page_ids,
            staging,
            cells,
            num_pages,
            self._page_words,
            _DIGEST_CELLS,
            *self._constants,
            gathers,
            self._block,
            stream=stream,
        )
        self._tell[(1, 1, 1)](cells, told, _DIGEST_CELLS, stream=stream)


def gather_pages(kv: PagedKV, page_ids: Tensor, layer_start: int, layer_end: int, out: Tensor) -> Tensor:
    """See `ops.gather_pages`; the digest stays on the device. The upload of the planes' addresses is waited
    for, which `PageMover` has done before."""
    return _move(kv, page_ids, layer_start, layer_end, out, gathers=True)


def scatter_pages(kv: PagedKV, page_ids: Tensor, layer_start: int, layer_end: int, src: Tensor) -> Tensor:
    """See `ops.scatter_pages` and `gather_pages`."""
    return _move(kv, page_ids, layer_start, layer_end, src, gathers=False)


def _move(
    kv: PagedKV, page_ids: Tensor, layer_start: int, layer_end: int, staging: Tensor, *, gathers: bool
) -> Tensor:
    cells = torch.zeros(_DIGEST_CELLS, dtype=torch.int64, device=staging.device)
    num_planes = 2 * (layer_end - layer_start)
    if not num_planes or not page_ids.numel():
        return cells.sum()
    page_bytes = kv.k[0].stride(0) * kv.k[0].element_size()
    assert page_bytes % 8 == 0, "a page is whole 8-byte words"
    layers = range(layer_start, layer_end)
    on_host = [plane.data_ptr() for layer in layers for plane in (kv.k[layer], kv.v[layer])]
    page_words = page_bytes // 8
    block, num_warps = _block(page_words)
    _move_kernel[(page_ids.numel(), num_planes)](
        torch.tensor(on_host, dtype=torch.int64, device=staging.device),
        page_ids,
        staging[: staging.numel() // 8 * 8].view(torch.int64),
        cells,
        page_ids.numel(),
        page_words,
        _DIGEST_CELLS,
        row_words=ROW_WORDS,
        row_step=ROW_STEP,
        column_step=COLUMN_STEP,
        gathers=gathers,
        block=block,
        num_warps=num_warps,
    )
    return cells.sum()


def _block(page_words: int) -> tuple[int, int]:
    """Words at a time, and warps."""
    block = min(_MAX_BLOCK_WORDS, triton.next_power_of_2(page_words))
    return block, 4 if block > 512 else 1
