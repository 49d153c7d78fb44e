"""Where the kernels in CUDA C++ can be tested."""

from __future__ import annotations

import pytest
import torch

from phloem.kernels.hopper_ops.program import has_bindings


def skip_unless_hopper() -> None:
    """With what is missing."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernels are for Hopper (compute capability 9.0)")
    if not has_bindings():
        pytest.skip("cuda.bindings can't be used: pip install cuda-bindings, as CUDA builds of torch do")
