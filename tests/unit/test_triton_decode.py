"""The decode step's fused kernels in Triton's interpreter, against plain torch."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from phloem.kernels.reference import rope
from phloem.kernels.reference.activation import act_mul
from phloem.kernels.triton_ops.decode_attention import Joints, decode_attention
from phloem.kernels.triton_ops.key_shares import FIELDS, make_items, num_items
from phloem.kernels.triton_ops.skinny import Squares, Workspace, skinny_linear
from phloem.kernels.triton_ops.tilings import Tiling
from phloem.kernels.types import Activation
from tests.support.device_ops import HEADS, Heads, paged_batch, relative_error

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels for real")

CPU = torch.device("cpu")
EPS = 1e-5


def workspace() -> Workspace:
    return Workspace(CPU, max_cells=1 << 16, max_tiles=64)


@pytest.mark.parametrize(("split_k", "tma"), [(1, True), (2, False), (4, True)])
@pytest.mark.parametrize("num_rows", [1, 20])
def test_plain_product(num_rows: int, split_k: int, tma: bool) -> None:
    x, w, bias = torch.randn(num_rows, 256), torch.randn(96, 256), torch.randn(96)
    out = torch.empty(num_rows, 96)
    meeting = workspace()
    for _ in range(2):  # the arrivals are back at zero after a launch
        skinny_linear(x, w, out, Tiling(32, 64, split_k, 2, 4, tma=tma), meeting, bias=bias)
        torch.testing.assert_close(out, x @ w.T + bias, rtol=1e-4, atol=1e-4)
    assert not meeting.arrivals.any()


@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", get_args(Activation))
def test_normed_gated_product(activation: Activation, split_k: int, bias: bool) -> None:
    stream, gain, w = torch.randn(5, 128), torch.randn(128), torch.randn(2 * 64, 128) / 8
    offsets = torch.randn(128) if bias else None
    squares = torch.zeros(3, 8)
    squares[:, :5] = torch.stack([part.square().sum(1) for part in torch.split(stream, [32, 64, 32], dim=1)])
    out = torch.empty(5, 64)
    skinny_linear(
        stream * gain,
        w,
        out,
        Tiling(16, 32, split_k, 2, 4, tma=bias),
        workspace(),
        bias=offsets,
        norm=Squares(squares, 3),
        eps=EPS,
        activation=activation,
    )
    both = torch.nn.functional.rms_norm(stream, (128,), gain, EPS) @ w.T + (0 if offsets is None else offsets)
    expected = act_mul(both, activation)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("split_k", [1, 4])
def test_product_into_the_residual_stream(split_k: int) -> None:
    x, w, gain = torch.randn(5, 256), torch.randn(64, 256) / 16, torch.randn(64)
    residual = torch.randn(5, 64)
    expected = residual + x @ w.T
    out, squares = torch.empty(5, 64), torch.zeros(4, 8)
    skinny_linear(
        x,
        w,
        out,
        Tiling(16, 64, split_k, 2, 4),
        workspace(),
        residual=residual,
        gain=gain,
        squares_out=squares,
    )
    torch.testing.assert_close(residual, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out, expected * gain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(squares.sum(0)[:5], expected.square().sum(1), rtol=1e-4, atol=1e-4)


def normed(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else torch.nn.functional.rms_norm(x, x.shape[-1:], weight, EPS)


def work_of(slots: Tensor, kv_lens: tuple[int, ...], share: int, num_kv_heads: int) -> Tensor:
    """Items of shares that are smaller than they would be for so few keys."""
    work = np.full((num_items(len(kv_lens), num_kv_heads), FIELDS), 99, dtype=np.int32)
    make_items(slots.numpy(), np.array(kv_lens), share, work)
    return torch.from_numpy(work)


WAYS = [(heads, 16, False) for heads in HEADS]
WAYS += [(HEADS[1], 128, True), (HEADS[1], 4, False), (HEADS[3], 32, True)]


@pytest.mark.parametrize(("heads", "share", "has_norm"), WAYS)
def test_decode_attention(heads: Heads, share: int, has_norm: bool) -> None:
    page_size, kv_lens = 4, (1, 5, 40, 65)
    batch = paged_batch(heads, page_size, query_lens=(1, 1, 1, 1), kv_lens=kv_lens)
    qkv = torch.randn(4, heads.num_heads + 2 * heads.num_kv_heads, heads.head_dim)
    rotated = heads.num_heads + heads.num_kv_heads
    angles = torch.randn(70, heads.head_dim // 2)
    q_norm, k_norm = (torch.randn(heads.head_dim) if has_norm else None for _ in range(2))
    positions = torch.tensor(kv_lens) - 1
    pages = batch.page_table[torch.arange(4), positions // page_size]
    write_index = pages * page_size + positions % page_size
    slots = torch.tensor([3, 0, 2, 1])
    table = torch.empty(4, batch.page_table.shape[1], dtype=torch.int32)
    table[slots] = batch.page_table.to(torch.int32)

    cos = angles.cos()[positions].repeat(1, 2).unsqueeze(1)
    sin = torch.cat((-angles.sin()[positions], angles.sin()[positions]), 1).unsqueeze(1)
    both = torch.cat(
        (normed(qkv[:, : heads.num_heads], q_norm), normed(qkv[:, heads.num_heads : rotated], k_norm)), 1
    )
    expected_k, expected_v = batch.k_pages.clone(), batch.v_pages.clone()
    queries = rope.rope_write_kv(both, qkv[:, rotated:], cos, sin, expected_k, expected_v, write_index)
    expected = batch._replace(q=queries, k_pages=expected_k, v_pages=expected_v).expected()

    out = torch.full((4, heads.num_heads, heads.head_dim), float("nan"))
    joints = Joints(
        CPU,
        max_rows=4,
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
    )
    decode_attention(
        qkv,
        angles.cos(),
        angles.sin(),
        write_index,
        table,
        work_of(slots, kv_lens, share, heads.num_kv_heads),
        batch.k_pages,
        batch.v_pages,
        out,
        joints,
        scale=heads.head_dim**-0.5,
        q_norm=q_norm,
        k_norm=k_norm,
        eps=EPS,
        block_n=16,
    )
    assert relative_error(out, expected) < 1e-5
    torch.testing.assert_close(batch.k_pages, expected_k, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(batch.v_pages, expected_v, rtol=0, atol=0)
    assert not joints.arrivals.any()
