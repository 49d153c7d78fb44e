"""Root-mean-square norms by FlashInfer."""

from __future__ import annotations

import torch
from flashinfer.norm import fused_add_rmsnorm
from flashinfer.norm import rmsnorm as flashinfer_rmsnorm
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `ops.rms_norm`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    flashinfer_rmsnorm(x, weight, eps, out=out)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `ops.add_rms_norm`; x is overwritten with the result, which is returned."""
    fused_add_rmsnorm(x, residual, weight, eps)
    return x
