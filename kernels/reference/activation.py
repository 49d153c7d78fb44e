"""Activations on fused projections."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import gelu, silu

from phloem.kernels.types import Activation


def act_mul(gate_up: Tensor, activation: Activation) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    match activation:
        case "silu":
            return silu(gate).mul_(up)
        case "gelu":
            return gelu(gate).mul_(up)
        case "gelu_tanh":
            return gelu(gate, approximate="tanh").mul_(up)
