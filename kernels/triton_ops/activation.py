"""Activations on fused projections."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from phloem.kernels.types import Activation


@triton.jit
def activate(x, activation: tl.constexpr):
    """Of float32. tanh's approximation of GELU (Hendrycks and Gimpel, arXiv 1606.08415, section 2) is written
    with the sigmoid that it is: (1 + tanh(u)) / 2 = sigmoid(2 u)."""
    if activation == "silu":
        factor = 1.0 / (1.0 + tl.exp(-x))
    elif activation == "gelu":
        factor = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    else:
        tl.static_assert(activation == "gelu_tanh")
        factor = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    return x * factor


@triton.jit
def _act_mul_kernel(gate_up, out, width, block: tl.constexpr, activation: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    # The reference rounds the activated gate to the tensor's dtype before it multiplies.
    act = activate(gate, activation).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + column, (act * up).to(out.dtype.element_ty), mask=inside)


def act_mul(gate_up: Tensor, activation: Activation) -> Tensor:
    """See `ops.act_mul`."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    block = min(2048, triton.next_power_of_2(width))
    grid = (num_rows, triton.cdiv(width, block))
    _act_mul_kernel[grid](gate_up, out, width, block=block, activation=activation, num_warps=4)
    return out
