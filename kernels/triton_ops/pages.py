"""KV pages to and from a flat staging buffer, with the digest of `reference/pages.py` in the same pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from phloem.kernels.reference.pages import COLUMN_STEP, ROW_STEP, ROW_WORDS
from phloem.kernels.types import PagedKV

_BLOCK_WORDS = 1024


@triton.jit
def _move_kernel(
    planes,
    page_ids,
    staging,
    digest,
    num_pages,
    page_words,
    row_words: tl.constexpr,
    row_step: tl.constexpr,
    column_step: tl.constexpr,
    gathers: tl.constexpr,
    block: tl.constexpr,
):
    plane = tl.program_id(0)
    page = tl.program_id(1)
    base = tl.load(planes + plane).to(tl.pointer_type(tl.int64))
    pages = base + tl.load(page_ids + page) * page_words
    first = (plane.to(tl.int64) * num_pages + page) * page_words
    word = tl.program_id(2) * block + tl.arange(0, block)
    inside = word < page_words
    if gathers:
        value = tl.load(pages + word, mask=inside, other=0)
        tl.store(staging + first + word, value, mask=inside)
    else:
        value = tl.load(staging + first + word, mask=inside, other=0)
        tl.store(pages + word, value, mask=inside)
    place = first + word
    row_weight = ((place // row_words) * row_step) | 1
    column_weight = ((place % row_words) * column_step) | 1
    tl.atomic_add(digest, tl.sum(value * row_weight * column_weight, axis=0))


def gather_pages(
    kv: PagedKV,
    page_ids: Tensor,
    layer_start: int,
    layer_end: int,
    out: Tensor,
    addresses: Tensor | None = None,
    digest: Tensor | None = None,
) -> Tensor:
    """See `ops.gather_pages`; the digest stays on the device, int64 `[1]`: in `digest`, if that is given.

    With `addresses` (`ops.plane_addresses`) only launches; without, their upload is waited for.
    """
    return _move(kv, page_ids, layer_start, layer_end, out, addresses, digest, gathers=True)


def scatter_pages(
    kv: PagedKV,
    page_ids: Tensor,
    layer_start: int,
    layer_end: int,
    src: Tensor,
    addresses: Tensor | None = None,
    digest: Tensor | None = None,
) -> Tensor:
    """See `ops.scatter_pages` and `gather_pages`."""
    return _move(kv, page_ids, layer_start, layer_end, src, addresses, digest, gathers=False)


def _move(
    kv: PagedKV,
    page_ids: Tensor,
    layer_start: int,
    layer_end: int,
    staging: Tensor,
    addresses: Tensor | None,
    digest: Tensor | None,
    *,
    gathers: bool,
) -> Tensor:
    if digest is None:
        digest = torch.zeros(1, dtype=torch.int64, device=staging.device)
    num_planes = 2 * (layer_end - layer_start)
    if not num_planes or not page_ids.numel():
        return digest
    page_bytes = kv.k[0].stride(0) * kv.k[0].element_size()
    assert page_bytes % 8 == 0, "a page is whole 8-byte words"
    if addresses is None:
        layers = range(layer_start, layer_end)
        on_host = [plane.data_ptr() for layer in layers for plane in (kv.k[layer], kv.v[layer])]
        pointers = torch.tensor(on_host, dtype=torch.int64, device=staging.device)
    else:
        pointers = addresses[2 * layer_start : 2 * layer_end]
    page_words = page_bytes // 8
    _move_kernel[(num_planes, page_ids.numel(), triton.cdiv(page_words, _BLOCK_WORDS))](
        pointers,
        page_ids,
        staging[: staging.numel() // 8 * 8].view(torch.int64),
        digest,
        page_ids.numel(),
        page_words,
        row_words=ROW_WORDS,
        row_step=ROW_STEP,
        column_step=COLUMN_STEP,
        gathers=gathers,
        block=_BLOCK_WORDS,
        num_warps=4,
    )
    return digest
