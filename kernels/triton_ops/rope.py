"""Rotary position embedding and the write of K and V into pages, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rope_write_kernel(
    qkv,
    cos,
    sin,
    write_index,
    q_out,
    k_pages,
    v_pages,
    token_stride,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    half: tl.constexpr,
    block_half: tl.constexpr,
    block_heads: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * block_heads + tl.arange(0, block_heads)[:, None]
    dim = tl.arange(0, block_half)[None, :]
    head_dim: tl.constexpr = 2 * half
    inside = (head < num_heads + 2 * num_kv_heads) & (dim < half)
    source = qkv + token * token_stride + head * head_dim + dim
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    table = token * head_dim + dim
    c = tl.load(cos + table, mask=dim < half, other=0.0).to(tl.float32)
    s = tl.load(sin + table + half, mask=dim < half, other=0.0).to(tl.float32)
    rotates = head < num_heads + num_kv_heads
    low = tl.where(rotates, first * c - second * s, first)
    high = tl.where(rotates, second * c + first * s, second)

    is_q = inside & (head < num_heads)
    q_target = q_out + token * num_heads * head_dim + head * head_dim + dim
    tl.store(q_target, low.to(q_out.dtype.element_ty), mask=is_q)
    tl.store(q_target + half, high.to(q_out.dtype.element_ty), mask=is_q)

    place = tl.load(write_index + token) * num_kv_heads * head_dim + dim
    is_k = inside & (head >= num_heads) & rotates
    k_target = k_pages + place + (head - num_heads) * head_dim
    tl.store(k_target, low.to(k_pages.dtype.element_ty), mask=is_k)
    tl.store(k_target + half, high.to(k_pages.dtype.element_ty), mask=is_k)

    is_v = inside & (head >= num_heads + num_kv_heads)
    v_target = v_pages + place + (head - num_heads - num_kv_heads) * head_dim
    tl.store(v_target, low.to(v_pages.dtype.element_ty), mask=is_v)
    tl.store(v_target + half, high.to(v_pages.dtype.element_ty), mask=is_v)


def rope_write_kv(
    qk: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_pages: Tensor, v_pages: Tensor, write_index: Tensor
) -> Tensor:
    """See `ops.rope_write_kv`. When `qk` and `v` are neighbours in one projection's output, it is read in
    place; otherwise they are joined first."""
    num_tokens, num_rotated, head_dim = qk.shape
    num_kv_heads = v.shape[1]
    num_heads = num_rotated - num_kv_heads
    qkv = qk if _adjoin(qk, v) else torch.cat((qk, v), dim=1)
    out = torch.empty((num_tokens, num_heads, head_dim), dtype=qk.dtype, device=qk.device)
    block_heads = 8
    grid = (num_tokens, triton.cdiv(num_rotated + num_kv_heads, block_heads))
    _rope_write_kernel[grid](
        qkv,
        cos,
        sin,
        write_index,
        out,
        k_pages,
        v_pages,
        qkv.stride(0),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        half=head_dim // 2,
        block_half=triton.next_power_of_2(head_dim // 2),
        block_heads=block_heads,
        num_warps=4,
    )
    return out


def _adjoin(qk: Tensor, v: Tensor) -> bool:
    """Whether v's heads lie right behind qk's in the same rows."""
    rows = qk.stride(0) == v.stride(0) or qk.shape[0] == 1
    dense = qk.stride(1) == qk.shape[2] == v.stride(1) and qk.stride(2) == v.stride(2) == 1
    return rows and dense and v.data_ptr() == qk.data_ptr() + qk.shape[1] * qk.shape[2] * qk.element_size()
