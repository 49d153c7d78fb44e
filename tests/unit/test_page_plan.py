"""Attention over pages on Hopper: which models it takes, and how its blocks use a multiprocessor."""

from __future__ import annotations

import pytest

from phloem.kernels.hopper_ops.page_plan import TILE, plan_pages
from phloem.kernels.types import DecodeShape

LLAMA = DecodeShape(4096, 14336, 128256, 32, 8, 128)
QWEN2 = DecodeShape(3584, 18944, 152064, 28, 4, 128)
WIDE = DecodeShape(512, 1536, 4096, 4, 1, 256)
NARROW = DecodeShape(512, 1536, 4096, 8, 2, 64)
SHARED_BYTES = 228 << 10  # of a multiprocessor
OF_SYSTEM, OTHERS = 1024, 1024  # of each block: kept by CUDA; barriers and shares
MULTIPROCESSORS = 132


@pytest.mark.parametrize("shape", [LLAMA, QWEN2, WIDE, NARROW])
@pytest.mark.parametrize("page_size", [16, 32])
def test_rings_fit_and_keep_memory_busy(shape: DecodeShape, page_size: int) -> None:
    plan = plan_pages(shape, page_size, MULTIPROCESSORS)
    assert plan is not None
    assert plan.slot_bytes == 2 * TILE * shape.num_kv_heads * shape.head_dim * 2
    assert plan.blocks == plan.per_multiprocessor * MULTIPROCESSORS
    assert plan.per_multiprocessor * (plan.shared_bytes + OF_SYSTEM + OTHERS) <= SHARED_BYTES
    assert plan.per_multiprocessor * plan.shared_bytes >= 128 << 10, "bytes that are under way"
    assert plan.stages >= 3


@pytest.mark.parametrize(
    ("shape", "page_size"),
    [
        (LLAMA._replace(num_heads=72), 16),  # nine queries of a KV head
        (LLAMA._replace(num_heads=9, num_kv_heads=3), 16),
        (LLAMA._replace(num_heads=16, num_kv_heads=16), 16),
        (LLAMA._replace(head_dim=96), 16),
        (LLAMA._replace(head_dim=256), 16),  # two tiles in a ring are too few
        (LLAMA, 8),
    ],
)
def test_others_are_left_to_another_kernel(shape: DecodeShape, page_size: int) -> None:
    assert plan_pages(shape, page_size, MULTIPROCESSORS) is None
