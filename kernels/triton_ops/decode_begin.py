"""The first kernels of a decode step: the rows' new pages; then which token each row has, its embedding, and
the first norm's share."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_PLACERS, _PAIRS = 16, 256  # programs, and pairs that each takes at a time


@triton.jit
def _place_pages_kernel(table, count, pairs, stride, block: tl.constexpr):
    total = tl.load(count)
    for start in range(tl.program_id(0) * block, total, stride):
        index = start + tl.arange(0, block)
        used = index < total
        place = tl.load(pairs + 2 * index, mask=used, other=0)
        page = tl.load(pairs + 2 * index + 1, mask=used, other=0)
        tl.store(table + place.to(tl.int64), page, mask=used)


def place_pages(table: Tensor, count: Tensor, pairs: Tensor) -> None:
    """See `ops.place_pages`."""
    _place_pages_kernel[(_PLACERS,)](table, count, pairs, _PLACERS * _PAIRS, block=_PAIRS, num_warps=4)


@triton.jit
def _begin_kernel(
    token,
    slot,
    last_token,
    embedding,
    gain,
    residual,
    scaled,
    squares,
    width: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < width
    known = tl.load(token + row)
    made = tl.load(last_token + tl.load(slot + row))
    source = embedding + tl.where(known < 0, made, known) * width + column
    value = tl.load(source, mask=inside, other=0.0)
    tl.store(residual + row * width + column, value, mask=inside)
    value = value.to(tl.float32)
    tl.store(squares + row, tl.sum(value * value, axis=0))
    value = value * tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(scaled + row * width + column, value.to(scaled.dtype.element_ty), mask=inside)


def begin_rows(
    token: Tensor,
    slot: Tensor,
    last_token: Tensor,
    embedding: Tensor,
    gain: Tensor,
    residual: Tensor,
    scaled: Tensor,
    squares: Tensor,
) -> None:
    """token, slot int64 `[B]`; where a token is negative, `last_token[slot]` takes its place. embedding
    `[V, N]`, gain `[N]`.

    Writes residual and `scaled` (times the gain) `[B, N]`, and squares, float32 `[1, B]` or wider.
    """
    width = embedding.shape[1]
    block = triton.next_power_of_2(width)
    _begin_kernel[(len(token),)](
        token,
        slot,
        last_token,
        embedding,
        gain,
        residual,
        scaled,
        squares,
        width=width,
        block=block,
        num_warps=4 if block <= 2048 else 8,
    )
