"""The kernel of whole decode steps: which models it takes, and how blocks share the work."""

from __future__ import annotations

import numpy as np
import pytest

from phloem.kernels.hopper_ops.decode_step import MAX_ROWS, plan_step
from phloem.kernels.triton_ops.key_shares import FIELDS, ONE_EACH, make_items, num_items, share_size
from phloem.kernels.types import DecodeShape

LLAMA = DecodeShape(4096, 14336, 128256, 32, 8, 128)
QWEN2 = DecodeShape(3584, 18944, 152064, 28, 4, 128)
SMOLLM2 = DecodeShape(576, 1536, 49152, 9, 3, 64)
SHARED_BYTES = 227 << 10
MULTIPROCESSORS = 132


@pytest.mark.parametrize("shape", [LLAMA, QWEN2, SMOLLM2])
def test_ring_and_attention_fit_into_shared_memory(shape: DecodeShape) -> None:
    plan = plan_step(shape, MULTIPROCESSORS)
    assert plan is not None
    group = shape.num_heads // shape.num_kv_heads
    attention = 8 * group * (shape.head_dim + 2) * 4
    assert plan.shared_bytes + attention < SHARED_BYTES
    for rows in (2, MAX_ROWS):
        slots = plan.stages(rows) * (32 + rows) * 512
        assert plan.stages(rows) >= 8
        assert slots + 1024 <= plan.shared_bytes < slots + 1024 + (32 + rows) * 512, "no slot is left unused"
    assert plan.stages(2) > plan.stages(MAX_ROWS)


def test_blocks_have_equal_shares_where_they_can() -> None:
    plan = plan_step(LLAMA, MULTIPROCESSORS)
    assert plan is not None
    assert plan.blocks == 128  # 4,096, 6,144 and 28,672 rows are multiples of 128 tiles of 16


@pytest.mark.parametrize(
    "shape",
    [
        LLAMA._replace(hidden_size=4104),  # inputs are no whole 64s
        LLAMA._replace(vocab_size=128_250),  # outputs are no whole tiles
        LLAMA._replace(num_kv_heads=2),  # 16 query heads of a KV head
        LLAMA._replace(head_dim=96),
    ],
)
def test_others_are_left_to_several_launches(shape: DecodeShape) -> None:
    assert plan_step(shape, MULTIPROCESSORS) is None


@pytest.mark.parametrize("num_rows", range(1, MAX_ROWS + 1))
def test_every_block_gets_an_item_of_keys(num_rows: int) -> None:
    rng = np.random.default_rng(num_rows)
    kv_lens = rng.integers(1, 9000, num_rows)
    work = np.zeros((num_items(num_rows, 8), FIELDS), np.int32)
    make_items(np.arange(num_rows), kv_lens, share_size(kv_lens, 8, ONE_EACH), work)
    count = int((work[:, 0] >= 0).sum())
    assert count <= num_rows + 16
    sizes = work[:count, 4] - work[:count, 3]
    assert sizes.sum() == (kv_lens - 1).sum()
    assert sizes.max() <= max(64, -(-int(kv_lens.sum()) // 16) + 64)
