"""Causal attention of a ragged batch over paged K and V: the fallback where FlashInfer has no kernel.

One program takes a block of queries of one sequence and one KV head; the query heads that share the KV head
are rows of the same block, so that decode (one query) still fills the matrix units. Softmax is computed
online (Dao et al., FlashAttention-2, 2023). float32 is multiplied as float32, not as tf32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _attention_kernel(
    q,
    k_pages,
    v_pages,
    out,
    page_table,
    query_starts,
    kv_lens,
    table_stride,
    scale_log2,
    window,
    group: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    page_size: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_d: tl.constexpr,
):
    sequence = tl.program_id(0)
    kv_head = tl.program_id(2)
    first_row = tl.load(query_starts + sequence)
    query_len = tl.load(query_starts + sequence + 1) - first_row
    kv_len = tl.load(kv_lens + sequence)
    m = tl.program_id(1) * block_m + tl.arange(0, block_m)
    query = m // group
    dim = tl.arange(0, block_d)
    in_dim = dim < head_dim
    head = kv_head * group + m % group
    row = ((first_row + query).to(tl.int64) * (group * num_kv_heads) + head) * head_dim
    is_query = query < query_len
    q_block = tl.load(q + row[:, None] + dim[None, :], mask=is_query[:, None] & in_dim[None, :], other=0.0)
    position = kv_len - query_len + query

    last_query = tl.minimum(((tl.program_id(1) + 1) * block_m + group - 1) // group, query_len)
    end = kv_len - query_len + last_query
    if tl.program_id(1) * block_m >= query_len * group:
        end = kv_len - kv_len  # beside a longer sequence: no queries, so nothing to read
    begin = kv_len - kv_len
    if window > 0:
        first_position = kv_len - query_len + tl.program_id(1) * block_m // group
        begin = tl.maximum(0, first_position - window + 1) // block_n * block_n
    best = tl.full((block_m,), float("-inf"), tl.float32)
    total = tl.zeros((block_m,), tl.float32)
    sums = tl.zeros((block_m, block_d), tl.float32)
    for start in tl.range(begin, end, block_n):
        n = start + tl.arange(0, block_n)
        in_kv = n < kv_len
        page = tl.load(page_table + sequence * table_stride + n // page_size, mask=in_kv, other=0)
        place = ((page * page_size + n % page_size) * num_kv_heads + kv_head) * head_dim
        in_tile = in_kv[:, None] & in_dim[None, :]
        keys = tl.load(k_pages + place[:, None] + dim[None, :], mask=in_tile, other=0.0)
        scores = tl.dot(q_block, tl.trans(keys), input_precision="ieee") * scale_log2
        visible = (n[None, :] <= position[:, None]) & in_kv[None, :]
        if window > 0:
            visible = visible & (n[None, :] > position[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        safe_best = tl.where(new_best == float("-inf"), 0.0, new_best)
        weights = tl.exp2(scores - safe_best[:, None])
        shrink = tl.exp2(best - safe_best)
        values = tl.load(v_pages + place[:, None] + dim[None, :], mask=in_tile, other=0.0)
        total = total * shrink + tl.sum(weights, axis=1)
        weighted = tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        sums = sums * shrink[:, None] + weighted
        best = new_best
    result = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(
        out + row[:, None] + dim[None, :],
        result.to(out.dtype.element_ty),
        mask=is_query[:, None] & in_dim[None, :],
    )


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    query_starts: Tensor,
    kv_lens: Tensor,
    max_query_len: int,
    scale: float,
    window: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """See `ops.paged_attention`.

    page_table int64 `[B, max_pages]`; query_starts int64 `[B + 1]`, rows of q where each sequence begins;
    kv_lens int64 `[B]`; all on q's device. `max_query_len` is the longest sequence's number of queries.
    """
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = k_pages.shape[2]
    group = num_heads // num_kv_heads
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    rows = max_query_len * group
    tile = _tile(rows, head_dim, is_float32=q.dtype == torch.float32)
    grid = (kv_lens.numel(), triton.cdiv(rows, tile.block_m), num_kv_heads)
    _attention_kernel[grid](
        q.contiguous(),
        k_pages,
        v_pages,
        out,
        page_table,
        query_starts,
        kv_lens,
        page_table.stride(0),
        scale * 1.4426950408889634,
        window,
        group=group,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=k_pages.shape[1],
        block_m=tile.block_m,
        block_n=tile.block_n,
        block_d=triton.next_power_of_2(head_dim),
        num_warps=tile.num_warps,
        num_stages=2,
    )
    return out


class _Tile(NamedTuple):
    block_m: int
    block_n: int
    num_warps: int


def _tile(rows: int, head_dim: int, *, is_float32: bool) -> _Tile:
    """float32 goes without matrix units: a thread holds its operands in registers, and a tile with more than
    512 products a thread (block_m x block_n x head_dim) spills them. 64 x 64 on 4 warps took 8 KiB of stack a
    thread and ran at 0.5 TFLOP/s on an H200."""
    few = rows <= 16
    if not is_float32:
        return _Tile(16 if few else 64, 64 if head_dim <= 128 else 32, 4 if head_dim <= 128 else 8)
    if few:
        return _Tile(16, 32, 4 if head_dim <= 128 else 8)
    return _Tile(64 if head_dim <= 64 else 32 if head_dim <= 128 else 16, 32, 8)
