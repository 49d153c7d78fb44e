"""What the ops run on CUDA: FlashInfer's norms where it is installed, Triton for the rest."""

from __future__ import annotations

import importlib.util

from torch import Tensor

from phloem.kernels.triton_ops import norm as triton_norm
from phloem.kernels.triton_ops.activation import act_mul
from phloem.kernels.triton_ops.decode_begin import place_pages
from phloem.kernels.triton_ops.pages import gather_pages, scatter_pages
from phloem.kernels.triton_ops.rope import rope_write_kv
from phloem.kernels.triton_ops.sampling import apply_bitmask, sample, sample_to_slots

__all__ = [
    "act_mul",
    "add_rms_norm",
    "apply_bitmask",
    "gather_pages",
    "place_pages",
    "rms_norm",
    "rope_write_kv",
    "sample",
    "sample_to_slots",
    "scatter_pages",
]


def _has_flashinfer_norms() -> bool:
    """Whether they can be called at once: nobody waits for a compiler in the middle of a request."""
    if importlib.util.find_spec("flashinfer") is None:
        return False
    try:
        from phloem.kernels.flashinfer_ops.availability import norms_are_compiled
    except (ImportError, RuntimeError, OSError):  # it is there, but broken: the engine's log says so
        return False
    return norms_are_compiled()


HAS_FLASHINFER = _has_flashinfer_norms()

if HAS_FLASHINFER:
    from phloem.kernels.flashinfer_ops import norm as flashinfer_norm


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if HAS_FLASHINFER and x.dim() == 2 and x.element_size() == 2:
        return flashinfer_norm.rms_norm(x, weight, eps)
    return triton_norm.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    if HAS_FLASHINFER and x.element_size() == 2:
        return flashinfer_norm.add_rms_norm(x, residual, weight, eps)
    return triton_norm.add_rms_norm(x, residual, weight, eps)
