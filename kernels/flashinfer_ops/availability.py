"""FlashInfer's kernels that a model needs, and which of them nobody has compiled yet.

FlashInfer looks for a kernel among those compiled ahead of time, then in its cache; else it compiles it with
nvcc when it is first called, which takes minutes. So the engine asks, and compiles, before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from flashinfer.jit.attention import gen_batch_prefill_module
from flashinfer.jit.core import JitSpec
from flashinfer.jit.norm import gen_norm_module


def missing_kernels(dtype: torch.dtype, head_dim: int, *, hopper: bool) -> tuple[str, ...]:
    """Names of those kernels of `FlashInferLane` and the norms that would have to be compiled."""
    return tuple(spec.name for spec in _needed(dtype, head_dim, hopper) if not spec.is_compiled)


def norms_are_compiled() -> bool:
    return bool(gen_norm_module().is_compiled)


def compile_missing(
    dtype: torch.dtype, head_dim: int, *, hopper: bool, progress: Callable[[int, int], None]
) -> None:
    """Compiles them one by one; `progress(done, total)`. Raises RuntimeError with the compiler's output."""
    missing = [spec for spec in _needed(dtype, head_dim, hopper) if not spec.is_compiled]
    for done, spec in enumerate(missing):
        progress(done, len(missing))
        spec.build(verbose=False)
    progress(len(missing), len(missing))


def _needed(dtype: torch.dtype, head_dim: int, hopper: bool) -> list[JitSpec]:
    backends = ("fa2", "fa3") if hopper else ("fa2",)
    attention = [
        gen_batch_prefill_module(
            backend, dtype, dtype, dtype, torch.int32, head_dim, head_dim, 0, False, False, False
        )
        for backend in backends
    ]
    return [*attention, gen_norm_module()]
