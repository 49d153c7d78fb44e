"""Rotary position embedding (neox halves) and the write of K and V into pages."""

from __future__ import annotations

from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half])
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def rope_write_kv(
    qk: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_pages: Tensor, v_pages: Tensor, write_index: Tensor
) -> Tensor:
    num_kv_heads, head_dim = k_pages.shape[2:]
    num_heads = qk.shape[1] - num_kv_heads
    rotated = rotate(qk, cos, sin)
    k_pages.view(-1, num_kv_heads, head_dim).index_copy_(0, write_index, rotated[:, num_heads:])
    v_pages.view(-1, num_kv_heads, head_dim).index_copy_(0, write_index, v)
    return rotated[:, :num_heads]
