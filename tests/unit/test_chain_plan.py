"""The launches of products between two attentions: which models they take, and how blocks share the work."""

from __future__ import annotations

import pytest
import torch

from phloem.kernels.hopper_ops.chain_plan import MAX_JOINS, NAMES, SIZES, TEAMS, plan_chain, size_of
from phloem.kernels.hopper_ops.product_chain import chain_defines, multiply_source
from phloem.kernels.types import DecodeShape

LLAMA = DecodeShape(4096, 14336, 128256, 32, 8, 128)
QWEN2 = DecodeShape(3584, 18944, 152064, 28, 4, 128)
QWEN3 = DecodeShape(4096, 12288, 151936, 32, 8, 128)
SMOLLM2 = DecodeShape(576, 1536, 49152, 9, 3, 64)
SHARED_BYTES = 227 << 10
BLOCKS = {1: 132, 2: 132, 4: 120}  # an H200


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", [LLAMA, QWEN2, QWEN3, SMOLLM2])
def test_tiles_cover_the_weights_and_parts_the_inputs(shape: DecodeShape, size: int) -> None:
    plan = plan_chain(shape, size, BLOCKS)
    assert plan is not None
    for name, (product, n, k) in zip(NAMES, shape.products(), strict=True):
        tiles, rows = plan.tiles[name], 2 * n if product == "gated" else n
        assert (tiles.num - 1) * tiles.rows < rows <= tiles.num * tiles.rows
        halves = tiles.rows // plan.boxes(name) // (2 if product == "gated" else 1)
        assert halves % 8 == 0, "what the swizzle repeats after is not cut"
        assert tiles.rows <= 256
        # A unit is freed when the one behind it is there; of a small tile as soon as it is read.
        units = 1 if plan.boxes(name) == 1 else 3
        assert units * tiles.weight_bytes <= plan.weight_bytes
        assert units * tiles.x_bytes(size) <= plan.x_bytes
        assert tiles.weight_bytes % 1024 == tiles.x_bytes(size) % 1024 == 0
        if tiles.splits > 1:
            assert name in ("qkv", "o", "down")
            assert tiles.items <= plan.blocks, "parts are joined by blocks that are there at once"
            assert tiles.num <= MAX_JOINS
            assert k // 64 // tiles.depth >= tiles.splits, "every part has a unit"
            assert tiles.rows // 8 // TEAMS >= tiles.splits, "every part finishes columns"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", [LLAMA, QWEN2, QWEN3])
def test_rings_fill_shared_memory_and_blocks_are_busy(shape: DecodeShape, size: int) -> None:
    plan = plan_chain(shape, size, BLOCKS)
    assert plan is not None
    assert SHARED_BYTES - 1024 < plan.shared_bytes + 2048 <= SHARED_BYTES
    assert plan.weight_bytes % 1024 == plan.x_bytes % 1024 == 0
    assert plan.weight_bytes > SHARED_BYTES / 2
    for name, rows in (("gate_up", 2 * shape.intermediate_size), ("down", shape.hidden_size)):
        tiles = plan.tiles[name]
        rounds = -(-tiles.items // plan.blocks)
        assert rows / (rounds * tiles.rows * plan.blocks / tiles.splits) > 0.8, name


def test_llama_has_the_tiles_that_were_fastest() -> None:
    """`benchmarks/trace_product_chain.py` on an H200."""
    few, many = (plan_chain(LLAMA, size, BLOCKS) for size in (16, 64))
    assert few is not None and many is not None
    assert [few.tiles[name].rows for name in NAMES[:4]] == [48, 32, 224, 32]
    assert all(tiles.splits == 1 for tiles in few.tiles.values())
    assert [many.tiles[name].rows for name in NAMES[:4]] == [48, 64, 224, 64]
    assert [many.tiles[name].splits for name in NAMES[:4]] == [1, 2, 1, 2]
    assert (few.cluster, many.cluster) == (1, 2)


def test_without_room_there_is_no_plan() -> None:
    assert plan_chain(LLAMA, 64, {1: 0, 2: 0, 4: 0}) is None


def test_without_clusters_parts_meet_in_memory() -> None:
    plan = plan_chain(LLAMA, 64, {1: 132, 2: 0, 4: 0})
    assert plan is not None and plan.cluster == 1
    assert plan.tiles["down"].splits > 1 and plan.tiles["gate_up"].splits == 1
    assert plan.part_floats >= 64 * plan.tiles["down"].rows * plan.tiles["down"].items


@pytest.mark.parametrize("shape", [LLAMA, QWEN2, QWEN3, SMOLLM2])
def test_the_parts_of_a_tile_are_in_one_cluster(shape: DecodeShape) -> None:
    for size in SIZES:
        plan = plan_chain(shape, size, {4: 128})
        assert plan is not None and plan.cluster == 4
        assert all(plan.cluster % tiles.splits == 0 for tiles in plan.tiles.values())
        assert any(tiles.splits > 1 for tiles in plan.tiles.values()) or size == 16


@pytest.mark.parametrize(
    "shape",
    [
        LLAMA._replace(hidden_size=4104),  # inputs are no whole 64s
        LLAMA._replace(vocab_size=128_250),  # outputs are no whole 16s
    ],
)
def test_others_are_left_to_other_kernels(shape: DecodeShape) -> None:
    assert all(plan_chain(shape, size, BLOCKS) is None for size in SIZES)


def test_size_is_the_smallest_that_holds_the_rows() -> None:
    assert [size_of(rows) for rows in (1, 16, 17, 32, 33, 64)] == [16, 16, 32, 32, 64, 64]


def test_source_names_every_register_once() -> None:
    source = multiply_source(frozenset({24, 112}), half=False)
    assert source.count("template <>") == 2
    for rows in (24, 112):
        assert f"m64n{rows}k16.f32.bf16.bf16" in source
        assert f"multiply<{rows}>(float (&d)[{rows // 2}]" in source
    assert all(source.count(f'"+f"(d[{i}])') == (2 if i < 12 else 1) for i in range(56))
    assert ".f16.f16 {" in multiply_source(frozenset({24}), half=True)


def test_kernel_is_told_of_every_product() -> None:
    plan = plan_chain(LLAMA, 64, BLOCKS)
    assert plan is not None
    defines = chain_defines(plan, torch.float16)
    assert defines["HALF"] == 1 and defines["ROWS"] == 64
    for name in ("TILES", "DEPTHS", "SPLITS"):
        assert len(str(defines[name]).split(",")) == len(NAMES)
