"""What every backend of an op must do, beside the reference in float64: in Triton's interpreter and on CUDA.

Inputs are rounded to the dtype first, so that only the kernel's own arithmetic counts. Tolerances are
relative to the norm of the result (`tolerance` in device_ops.py); what is only moved must be equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from phloem.kernels.reference import activation, norm, pages, rope
from phloem.kernels.types import Activation
from phloem.shared.engine.models.kv_cache import KVCache
from tests.support.device_ops import Heads, PagedBatch, paged_batch, relative_error, tolerance

EPS = 1e-5


class LayerOps(NamedTuple):
    """The ops of a backend, with the signatures of `kernels/ops.py`."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    act_mul: Callable[[Tensor, Activation], Tensor]
    rope_write_kv: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    gather_pages: Callable[[KVCache, Tensor, int, int, Tensor], int | Tensor]
    scatter_pages: Callable[[KVCache, Tensor, int, int, Tensor], int | Tensor]


def check_attention(
    attend: Callable[[PagedBatch], Tensor],
    heads: Heads,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    query_lens: tuple[int, ...],
    kv_lens: tuple[int, ...],
    window: int = 0,
) -> None:
    """Decode rows and chunks in one batch, over shuffled pages."""
    batch = paged_batch(heads, page_size, query_lens=query_lens, kv_lens=kv_lens).to(device, dtype)
    assert relative_error(attend(batch), batch.expected(window)) < tolerance(dtype, device)


def check_norms(ops: LayerOps, dtype: torch.dtype, device: torch.device, rows: int, width: int) -> None:
    x, residual, weight = (_randn(shape, dtype) for shape in ((rows, width), (rows, width), (width,)))
    _close(
        ops.rms_norm(x.to(device), weight.to(device), EPS), norm.rms_norm(x.double(), weight.double(), EPS)
    )
    stream, out = residual.to(device), residual.double()
    expected = norm.add_rms_norm(x.double(), out, weight.double(), EPS)
    _close(ops.add_rms_norm(x.to(device), stream, weight.to(device), EPS), expected)
    _close(stream, out)


def check_norm_of_some_heads(ops: LayerOps, dtype: torch.dtype, device: torch.device, heads: Heads) -> None:
    """Rows that don't adjoin, as in Qwen3: the query heads of a fused projection."""
    fused = _randn((5, heads.num_heads + 2 * heads.num_kv_heads, heads.head_dim), dtype)
    weight = _randn((heads.head_dim,), dtype)
    queries = fused.to(device)[:, : heads.num_heads]
    expected = norm.rms_norm(fused.double()[:, : heads.num_heads], weight.double(), EPS)
    _close(ops.rms_norm(queries, weight.to(device), EPS), expected)


def check_activation(ops: LayerOps, dtype: torch.dtype, device: torch.device, rows: int, width: int) -> None:
    gate_up = _randn((rows, 2 * width), dtype)
    for name in get_args(Activation):
        _close(ops.act_mul(gate_up.to(device), name), activation.act_mul(gate_up.double(), name))


def check_rope(
    ops: LayerOps, dtype: torch.dtype, device: torch.device, heads: Heads, page_size: int, *, joined: bool
) -> None:
    """`joined`: q, k and v are neighbours in one projection's output, as the model has them."""
    num_tokens, rotated = 5, heads.num_heads + heads.num_kv_heads
    qkv = _randn((num_tokens, rotated + heads.num_kv_heads, heads.head_dim), dtype)
    angles = torch.randn(num_tokens, 1, heads.head_dim // 2)
    cos = torch.cat((angles.cos(), angles.cos()), -1).to(dtype)
    sin = torch.cat((-angles.sin(), angles.sin()), -1).to(dtype)
    num_pages = -(-4 * num_tokens // page_size)
    write_index = torch.randperm(num_pages * page_size)[:num_tokens]
    shape = (num_pages, page_size, heads.num_kv_heads, heads.head_dim)
    k, v = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    exact = qkv.double()
    expected = rope.rope_write_kv(
        exact[:, :rotated], exact[:, rotated:], cos.double(), sin.double(), k, v, write_index
    )
    on_device = qkv.to(device)
    k_out, v_out = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
    out = ops.rope_write_kv(
        on_device[:, :rotated] if joined else on_device[:, :rotated].clone(),
        on_device[:, rotated:] if joined else on_device[:, rotated:].clone(),
        cos.to(device),
        sin.to(device),
        k_out,
        v_out,
        write_index.to(device),
    )
    _close(out, expected)
    _close(k_out, k)
    assert torch.equal(v_out.cpu().double(), v)


def check_pages(
    ops: LayerOps,
    dtype: torch.dtype,
    device: torch.device,
    heads: Heads,
    page_size: int,
    *,
    layers: tuple[int, int],
) -> None:
    """Bytes and digests are the reference's; no page but those named is written."""
    shape = (9, page_size, heads.num_kv_heads, heads.head_dim)
    source = KVCache([_randn(shape, dtype) for _ in range(3)], [_randn(shape, dtype) for _ in range(3)])
    target = KVCache(
        [torch.zeros(shape, dtype=dtype, device=device) for _ in range(3)],
        [torch.zeros(shape, dtype=dtype, device=device) for _ in range(3)],
    )
    on_device = KVCache([k.to(device) for k in source.k], [v.to(device) for v in source.v])
    page_ids = torch.tensor([5, 1, 3])
    start, end = layers
    size = (end - start) * 2 * 3 * source.k[0][0].numel() * dtype.itemsize
    expected_bytes = torch.zeros(size + 5, dtype=torch.uint8)
    digest = pages.gather_pages(source, page_ids, start, end, expected_bytes)
    staged = torch.zeros(size + 5, dtype=torch.uint8, device=device)
    assert int(ops.gather_pages(on_device, page_ids.to(device), start, end, staged)) == digest
    assert torch.equal(staged.cpu(), expected_bytes)
    assert int(ops.scatter_pages(target, page_ids.to(device), start, end, staged)) == digest
    others = [0, 2, 4, 6, 7, 8]
    for layer in range(3):
        for wrote, had in ((target.k[layer], source.k[layer]), (target.v[layer], source.v[layer])):
            moved = had[page_ids] if start <= layer < end else torch.zeros_like(had[page_ids])
            assert torch.equal(wrote.cpu()[page_ids], moved)
            assert not wrote.cpu()[others].any()


def _randn(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


def _close(out: Tensor, expected: Tensor) -> None:
    assert out.shape == expected.shape
    assert relative_error(out, expected) < tolerance(out.dtype, out.device)
