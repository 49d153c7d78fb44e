"""Norms, activation, rotary embedding: the ops agree with float64 arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from phloem.kernels import ops
from phloem.kernels.types import Activation, DecodeShape, LinearWeight

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_agrees(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    tolerance = TOLERANCE[dtype]
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def naive_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 7, 64])
def test_rms_norm_agrees_with_float64(num_tokens: int, dtype: torch.dtype) -> None:
    x, weight = randn(num_tokens, 96, dtype=dtype), randn(96, dtype=dtype, seed=1)
    assert_agrees(ops.rms_norm(x, weight, 1e-5), naive_rms_norm(x, weight, 1e-5), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_heads_is_per_head(dtype: torch.dtype) -> None:
    x, weight = randn(5, 4, 32, dtype=dtype)[:, 1:3], randn(32, dtype=dtype, seed=1)
    assert_agrees(ops.rms_norm(x, weight, 1e-6), naive_rms_norm(x, weight, 1e-6), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 33])
def test_add_rms_norm_updates_residual_and_norms_the_sum(num_tokens: int, dtype: torch.dtype) -> None:
    x, residual = randn(num_tokens, 96, dtype=dtype), randn(num_tokens, 96, dtype=dtype, seed=1)
    weight = randn(96, dtype=dtype, seed=2)
    total = (x.double() + residual.double()).to(dtype)
    normed = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, total)
    assert_agrees(normed, naive_rms_norm(total, weight, 1e-5), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("activation", "factor"),
    [
        ("silu", torch.sigmoid),
        ("gelu", lambda gate: (1 + torch.erf(gate / 2**0.5)) / 2),
        ("gelu_tanh", lambda gate: (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) / 2),
    ],
)
def test_act_mul_takes_the_gate_first(
    activation: Activation, factor: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    gate_up = randn(9, 128, dtype=dtype)
    gate, up = gate_up.double().chunk(2, -1)
    assert_agrees(ops.act_mul(gate_up, activation), gate * factor(gate) * up, dtype)


def naive_rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Pairs (i, i + half) turn by their angle, written out in complex numbers."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.polar(
        torch.ones_like(angles), angles
    ).unsqueeze(1)
    return torch.cat((turned.real, turned.imag), -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 4, 64), (8, 2, 64), (8, 1, 128)])
def test_rope_write_kv_rotates_and_writes_only_its_slots(
    num_heads: int, num_kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype
) -> None:
    num_tokens, num_slots = 11, 64
    fused = randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    qk, v = fused[:, : num_heads + num_kv_heads], fused[:, num_heads + num_kv_heads :]
    angles = randn(num_tokens, head_dim // 2, seed=1).double()
    cos = torch.cat((angles.cos(), angles.cos()), -1).unsqueeze(1).to(dtype)
    sin = torch.cat((-angles.sin(), angles.sin()), -1).unsqueeze(1).to(dtype)
    shape = (num_slots // page_size, page_size, num_kv_heads, head_dim)
    k_pages, v_pages = torch.full(shape, 7.0, dtype=dtype), torch.full(shape, 7.0, dtype=dtype)
    write_index = torch.randperm(num_slots, generator=torch.Generator().manual_seed(2))[:num_tokens]

    q = ops.rope_write_kv(qk, v, cos, sin, k_pages, v_pages, write_index)

    expected = naive_rotate(qk, angles)
    assert_agrees(q, expected[:, :num_heads], dtype)
    assert_agrees(k_pages.flatten(0, 1)[write_index], expected[:, num_heads:], dtype)
    assert torch.equal(v_pages.flatten(0, 1)[write_index], v)
    others = torch.ones(num_slots, dtype=torch.bool).index_fill_(0, write_index, False)
    assert bool((k_pages.flatten(0, 1)[others] == 7.0).all())
    assert bool((v_pages.flatten(0, 1)[others] == 7.0).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 8, 17, 100])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("num_in", "num_out"), [(48, 80), (512, 3072)])
def test_linear_agrees_with_float64_in_every_layout(
    num_in: int, num_out: int, shared: bool, has_bias: bool, num_tokens: int, dtype: torch.dtype
) -> None:
    weight = randn(num_out, num_in, dtype=dtype) / num_in**0.5
    bias = randn(num_out, dtype=dtype, seed=1) if has_bias else None
    x = randn(num_tokens, num_in, dtype=dtype, seed=2)
    expected = x.double() @ weight.double().T
    if bias is not None:
        expected += bias.double()
    prepared = ops.prepare_linear(LinearWeight(weight, bias), shared=shared)
    assert_agrees(ops.linear(x, prepared), expected, dtype)
    assert_agrees(ops.linear(x, LinearWeight(weight, bias)), expected, dtype)
    if shared:
        assert torch.equal(prepared.weight, weight)


def test_steps_in_cuda_are_for_silu_alone() -> None:
    """Other models have Triton's launches: nothing of CUDA is asked for."""
    shape = DecodeShape(4096, 14336, 128256, 32, 8, 128, activation="gelu_tanh")
    for plan in (ops.plan_decode_step, ops.plan_chain_step):
        assert plan(shape, torch.bfloat16, torch.device("cuda")) is None
