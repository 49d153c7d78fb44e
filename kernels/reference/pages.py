"""KV pages to and from a flat staging buffer, with a digest of the bytes.

The digest is a weighted sum of the bytes as little-endian int64 words, modulo 2**64:

    digest = sum over rows r of  (r * ROW_STEP | 1) * sum over columns c of (c * COLUMN_STEP | 1) * word[r, c]

with words in rows of 1024, zeros after the last byte. Every weight is odd, hence invertible: one altered
word always changes the digest. Two swapped words change it unless their difference times that of their
weights is a multiple of 2**64. It guards against accidents, not against an adversary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from phloem.kernels.types import PagedKV

ROW_WORDS = 1024
ROW_STEP = -7046029254386353131  # 2**64 / golden ratio, as int64
COLUMN_STEP = -4417276706812531889


def gather_pages(kv: PagedKV, page_ids: Tensor, layer_start: int, layer_end: int, out: Tensor) -> int:
    def gather(pages: Tensor, staged: Tensor) -> None:
        torch.index_select(pages, 0, page_ids, out=staged)

    num_bytes = _for_each_plane(kv, page_ids, layer_start, layer_end, out, gather)
    return digest(out[:num_bytes])


def scatter_pages(kv: PagedKV, page_ids: Tensor, layer_start: int, layer_end: int, src: Tensor) -> int:
    def scatter(pages: Tensor, staged: Tensor) -> None:
        pages.index_copy_(0, page_ids, staged)

    num_bytes = _for_each_plane(kv, page_ids, layer_start, layer_end, src, scatter)
    return digest(src[:num_bytes])


def place_pages(table: Tensor, count: Tensor, pairs: Tensor) -> None:
    used = pairs[: int(count[0])]
    table.view(-1)[used[:, 0].long()] = used[:, 1]


def _for_each_plane(
    kv: PagedKV,
    page_ids: Tensor,
    layer_start: int,
    layer_end: int,
    staging: Tensor,
    move: Callable[[Tensor, Tensor], None],
) -> int:
    """Calls `move(pages, staged)` for K, then V of each layer; returns the bytes of staging in use."""
    planes = [plane for layer in range(layer_start, layer_end) for plane in (kv.k[layer], kv.v[layer])]
    if not planes:
        return 0
    shape = (len(page_ids), *planes[0].shape[1:])
    plane_bytes = len(page_ids) * planes[0].stride(0) * planes[0].element_size()
    for index, pages in enumerate(planes):
        staged = staging[index * plane_bytes : (index + 1) * plane_bytes]
        move(pages, staged.view(pages.dtype).view(shape))
    return plane_bytes * len(planes)


def digest(data: Tensor) -> int:
    whole = data.numel() // 8 * 8
    words = data[:whole].view(torch.int64)
    full_rows = words.numel() // ROW_WORDS
    rows = words[: full_rows * ROW_WORDS].view(full_rows, ROW_WORDS)
    column_weights = _weights(ROW_WORDS, COLUMN_STEP, data.device)
    row_weights = _weights(full_rows + 1, ROW_STEP, data.device)
    total = torch.dot(torch.mv(rows, column_weights), row_weights[:full_rows])
    rest = words[full_rows * ROW_WORDS :]
    if whole < data.numel():
        rest = torch.cat((rest, _padded_word(data[whole:])))
    last_row = torch.dot(rest, column_weights[: rest.numel()]) * row_weights[full_rows]
    return int(total + last_row)


def _weights(count: int, step: int, device: torch.device) -> Tensor:
    return (torch.arange(count, dtype=torch.int64, device=device) * step) | 1


def _padded_word(tail: Tensor) -> Tensor:
    padded = torch.zeros(8, dtype=torch.uint8, device=tail.device)
    padded[: tail.numel()] = tail
    return padded.view(torch.int64)
