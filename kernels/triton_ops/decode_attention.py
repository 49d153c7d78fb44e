"""Attention of one new token per sequence over paged K and V: rotation, the write of K and V, and the sum.

    program (KV head, item)          item: one row's share of keys (`key_shares.py`)

Each takes the query heads of its KV head as rows of one tile. The new token's key and value come from the
projection's output; the last part writes them into their page and starts its online softmax with them, so
that nobody reads what is just being written. The last part to arrive joins them all, in order (Dao et al.,
"Flash-Decoding", 2023).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from phloem.kernels.triton_ops.key_shares import num_items

_JOIN = 8  # parts whose loads are under way together


@triton.jit
def _rotated_halves(
    source, table_cos, table_sin, norm, eps, rows, half: tl.constexpr, in_rows, has_norm: tl.constexpr
):
    """Rows of heads (offsets `rows`), normed and rotated: two float32 tiles `[rows, half]`."""
    dim = tl.arange(0, half)
    place = source + rows[:, None] + dim[None, :]
    low = tl.load(place, mask=in_rows[:, None], other=0.0).to(tl.float32)
    high = tl.load(place + half, mask=in_rows[:, None], other=0.0).to(tl.float32)
    if has_norm:
        factor = tl.rsqrt((tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / (2 * half) + eps)
        low = low * factor[:, None] * tl.load(norm + dim).to(tl.float32)[None, :]
        high = high * factor[:, None] * tl.load(norm + half + dim).to(tl.float32)[None, :]
    cos = tl.load(table_cos + dim).to(tl.float32)[None, :]
    sin = tl.load(table_sin + dim).to(tl.float32)[None, :]
    return low * cos - high * sin, high * cos + low * sin


@triton.jit
def _decode_attention_kernel(
    qkv,
    cos,
    sin,
    q_norm,
    k_norm,
    write_index,
    page_table,
    k_pages,
    v_pages,
    out,
    work,
    part_sums,
    part_stats,
    arrivals,
    table_stride,
    eps,
    scale_log2,
    group: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    page_size: tl.constexpr,
    block_g: tl.constexpr,
    block_n: tl.constexpr,
    stages: tl.constexpr,
    join: tl.constexpr,
    has_norm: tl.constexpr,
    pdl: tl.constexpr,
):
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    half: tl.constexpr = head_dim // 2
    heads: tl.constexpr = group * num_kv_heads
    record = work + item * 8
    row_index = tl.load(record)
    slot = tl.load(record + 1)
    position = tl.load(record + 2)
    begin = tl.load(record + 3)
    end = tl.load(record + 4)
    first = tl.load(record + 5)
    used_parts = tl.load(record + 6)
    if pdl:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if row_index >= 0:
        sequence = row_index.to(tl.int64)
        part = item - first
        target = tl.load(write_index + sequence)
        table = page_table + slot.to(tl.int64) * table_stride
        g = tl.arange(0, block_g)
        in_g = g < group
        dim = tl.arange(0, head_dim)
        half_dim = tl.arange(0, half)
        row = qkv + sequence * ((heads + 2 * num_kv_heads) * head_dim)
        angle = position.to(tl.int64) * half
        q_low, q_high = _rotated_halves(
            row, cos + angle, sin + angle, q_norm, eps, (kv_head * group + g) * head_dim, half, in_g, has_norm
        )
        dtype = k_pages.dtype.element_ty
        q_low = q_low.to(dtype)
        q_high = q_high.to(dtype)

        best = tl.full((block_g,), float("-inf"), tl.float32)
        total = tl.zeros((block_g,), tl.float32)
        sums = tl.zeros((block_g, head_dim), tl.float32)
        if part == used_parts - 1:
            one = tl.arange(0, 1)
            k_low, k_high = _rotated_halves(
                row, cos + angle, sin + angle, k_norm, eps, (heads + kv_head + one) * head_dim, half,
                one < 1, has_norm,
            )  # fmt: skip
            k_low = k_low.to(dtype)
            k_high = k_high.to(dtype)
            value = tl.load(row + (heads + num_kv_heads + kv_head) * head_dim + dim)
            place = (target * num_kv_heads + kv_head) * head_dim
            tl.store(k_pages + place + one[:, None] + half_dim[None, :], k_low)
            tl.store(k_pages + place + half + one[:, None] + half_dim[None, :], k_high)
            tl.store(v_pages + place + dim, value)
            score = tl.sum(q_low.to(tl.float32) * k_low.to(tl.float32), axis=1)
            score += tl.sum(q_high.to(tl.float32) * k_high.to(tl.float32), axis=1)
            best = score * scale_log2
            total = tl.full((block_g,), 1.0, tl.float32)
            sums += value.to(tl.float32)[None, :]
        for start in tl.range(begin, end, block_n, num_stages=stages):
            n = start + tl.arange(0, block_n)
            seen = n < end
            page = tl.load(table + n // page_size, mask=seen, other=0).to(tl.int64)
            place = ((page * page_size + n % page_size) * num_kv_heads + kv_head) * head_dim
            tile = k_pages + place[:, None] + half_dim[None, :]
            low = tl.load(tile, mask=seen[:, None], other=0.0)
            high = tl.load(tile + half, mask=seen[:, None], other=0.0)
            scores = tl.dot(q_low, tl.trans(low))
            scores = tl.dot(q_high, tl.trans(high), scores) * scale_log2
            scores = tl.where(seen[None, :], scores, float("-inf"))
            new_best = tl.maximum(best, tl.max(scores, axis=1))
            weights = tl.exp2(scores - new_best[:, None])
            shrink = tl.exp2(best - new_best)
            values = tl.load(v_pages + place[:, None] + dim[None, :], mask=seen[:, None], other=0.0)
            total = total * shrink + tl.sum(weights, axis=1)
            sums = sums * shrink[:, None] + tl.dot(weights.to(dtype), values)
            best = new_best

        target_row = out + (sequence * heads + kv_head * group + g[:, None]) * head_dim
        if used_parts == 1:
            tl.store(
                target_row + dim[None, :],
                (sums / total[:, None]).to(out.dtype.element_ty),
                mask=in_g[:, None],
            )
        else:
            cell = (item.to(tl.int64) * num_kv_heads + kv_head) * group + g
            tl.store(part_sums + cell[:, None] * head_dim + dim[None, :], sums, mask=in_g[:, None])
            tl.store(part_stats + cell * 2, best, mask=in_g)
            tl.store(part_stats + cell * 2 + 1, total, mask=in_g)
            tl.debug_barrier()
            counter = arrivals + sequence * num_kv_heads + kv_head
            if tl.atomic_add(counter, 1, sem="acq_rel") == used_parts - 1:
                tl.store(counter, 0)
                top = tl.full((block_g,), float("-inf"), tl.float32)
                for base in range(0, used_parts, join):
                    for step in tl.static_range(join):
                        there = in_g & (base + step < used_parts)
                        cell = ((first + base + step).to(tl.int64) * num_kv_heads + kv_head) * group + g
                        stat = tl.load(
                            part_stats + cell * 2, mask=there, other=float("-inf"), cache_modifier=".cg"
                        )
                        top = tl.maximum(top, stat)
                top = tl.where(in_g, top, 0.0)
                joined = tl.zeros((block_g, head_dim), tl.float32)
                mass = tl.zeros((block_g,), tl.float32)
                for base in range(0, used_parts, join):
                    for step in tl.static_range(join):
                        there = in_g & (base + step < used_parts)
                        cell = ((first + base + step).to(tl.int64) * num_kv_heads + kv_head) * group + g
                        stat = tl.load(
                            part_stats + cell * 2, mask=there, other=float("-inf"), cache_modifier=".cg"
                        )
                        factor = tl.exp2(stat - top)
                        mass += factor * tl.load(
                            part_stats + cell * 2 + 1, mask=there, other=0.0, cache_modifier=".cg"
                        )
                        joined += factor[:, None] * tl.load(
                            part_sums + cell[:, None] * head_dim + dim[None, :],
                            mask=there[:, None],
                            other=0.0,
                            cache_modifier=".cg",
                        )
                mass = tl.where(in_g, mass, 1.0)
                tl.store(
                    target_row + dim[None, :],
                    (joined / mass[:, None]).to(out.dtype.element_ty),
                    mask=in_g[:, None],
                )


class Joints:
    """Where the parts of a sequence meet. One for a stream of launches; a graph keeps its addresses."""

    def __init__(
        self, device: torch.device, *, max_rows: int, num_heads: int, num_kv_heads: int, head_dim: int
    ) -> None:
        cells = max(num_items(rows, num_kv_heads) for rows in (1, max_rows)) * num_heads
        self.sums = torch.empty(cells * head_dim, dtype=torch.float32, device=device)
        self.stats = torch.empty(cells * 2, dtype=torch.float32, device=device)
        self.arrivals = torch.zeros(max_rows * num_kv_heads, dtype=torch.int32, device=device)


def decode_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    write_index: Tensor,
    page_table: Tensor,
    work: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    out: Tensor,
    joints: Joints,
    *,
    scale: float,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    block_n: int = 64,
    stages: int = 3,
    warps: int = 4,
    pdl: bool = False,
) -> None:
    """See the module. qkv `[B, H + 2 * H_kv, D]`, dense: query, key and value heads of one new token each.

    cos, sin `[max_position, D / 2]`; write_index int64 `[B]`; page_table int32 `[num_slots, max_pages]`; work
    int32 `[num_items, 8]`, the rows' items (`key_shares.py`); out `[B, H, D]`. D is a power of two of at
    least 32.
    """
    num_heads, head_dim = out.shape[1:]
    num_kv_heads = k_pages.shape[2]
    group = num_heads // num_kv_heads
    options = {"launch_pdl": True} if pdl else {}
    _decode_attention_kernel[(num_kv_heads, len(work))](
        qkv,
        cos,
        sin,
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        write_index,
        page_table,
        k_pages,
        v_pages,
        out,
        work,
        joints.sums,
        joints.stats,
        joints.arrivals,
        page_table.stride(0),
        eps,
        scale * 1.4426950408889634,
        group=group,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=k_pages.shape[1],
        block_g=max(16, triton.next_power_of_2(group)),
        block_n=block_n,
        stages=stages,
        join=_JOIN,
        has_norm=q_norm is not None,
        pdl=pdl,
        num_warps=warps,
        **options,
    )
