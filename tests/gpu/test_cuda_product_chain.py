"""Launches of several matrix products on Hopper against float64: joined, whole, ragged tiles, all sizes."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from phloem.kernels.hopper_ops.chain_plan import (
    CLUSTERS,
    NAMES,
    SHARED_BYTES,
    SIZES,
    ChainPlan,
    Tiles,
    size_of,
)
from phloem.kernels.hopper_ops.product_chain import ChainLink, ProductChain
from phloem.kernels.hopper_ops.program import resident_blocks
from phloem.kernels.types import LinearWeight
from tests.support.device_ops import relative_error
from tests.support.hopper import skip_unless_hopper

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
EPS = 1e-5
HIDDEN, QUERIES, INTER, QKV, VOCAB = 1536, 1024, 1856, 1280, 5008
TOLERANCE = 6e-3  # the result is rounded to 8 bits
ROWS = (1, 13, 16, 17, 32, 33, 64)


class Variant(NamedTuple):
    """depth and splits of what can be joined; rows of a tile; blocks, and how many of them are a cluster."""

    rows: int
    depth: int
    splits: int
    blocks: int
    cluster: int = 1
    dtype: torch.dtype = torch.bfloat16


VARIANTS = [
    Variant(64, 1, 1, 132),
    Variant(256, 1, 8, 132),
    Variant(240, 1, 5, 132),
    Variant(32, 4, 1, 40),
    Variant(64, 2, 2, 132),  # teams share a tile, and blocks its inputs
    Variant(128, 2, 3, 60),
    Variant(128, 1, 4, 96, 4),
    Variant(112, 1, 4, 120, 4),  # shares of unequal size
    Variant(64, 2, 2, 64, 4),  # two tiles of a cluster
    Variant(48, 2, 2, 128, 2),
    Variant(128, 1, 2, 132, 2, torch.float16),
    Variant(96, 1, 2, 64, 4),
]


def plan(variant: Variant, size: int) -> ChainPlan:
    def tiles(name: str, n: int) -> Tiles:
        splits = 1 if name in ("gate_up", "vocabulary") else variant.splits
        rows = variant.rows // 32 * 32 if name == "gate_up" else variant.rows  # halves of both of its weights
        return Tiles(rows, -(-n // rows), variant.depth, splits)

    widths = (QKV, HIDDEN, 2 * INTER, HIDDEN, VOCAB)
    found = {name: tiles(name, n) for name, n in zip(NAMES, widths, strict=True)}
    return ChainPlan(size, variant.blocks, found, variant.cluster)


class Made(NamedTuple):
    """The kernels of a variant, and what they take."""

    chain: ProductChain
    dtype: torch.dtype


@pytest.fixture(
    scope="module", params=VARIANTS, ids="{0.rows}x{0.depth}s{0.splits}b{0.blocks}c{0.cluster}".format
)
def made(request: pytest.FixtureRequest) -> Made:
    skip_unless_hopper()
    plans = {size: plan(request.param, size) for size in SIZES}
    return Made(ProductChain(plans, 2, request.param.dtype, CUDA), request.param.dtype)


def random(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=CUDA).to(dtype)


def weight(dtype: torch.dtype, n: int, k: int, *, has_bias: bool = True) -> LinearWeight:
    return LinearWeight(random(dtype, n, k) / k**0.5, random(dtype, n) if has_bias else None)


def normed(residual: Tensor, gain: Tensor) -> Tensor:
    exact = residual.double()
    return exact * torch.rsqrt(exact.square().mean(1, keepdim=True) + EPS) * gain.double()


def times(x: Tensor, w: LinearWeight) -> Tensor:
    y = x.double() @ w.weight.double().T
    return y if w.bias is None else y + w.bias.double()


@pytest.mark.parametrize("name", ["qkv", "vocabulary"])
@pytest.mark.parametrize("num_rows", ROWS)
def test_one_normed_product(made: Made, num_rows: int, name: str) -> None:
    chain, dtype = made
    residual, gain = random(dtype, num_rows, HIDDEN), random(dtype, HIDDEN)
    w = weight(dtype, QKV if name == "qkv" else VOCAB, HIDDEN)
    squares = torch.full((12, size_of(num_rows)), float("nan"), device=CUDA)
    squares[:, :num_rows] = residual.float().square().view(num_rows, 12, -1).sum(2).T
    out_dtype = dtype if name == "qkv" else torch.float32
    out = torch.full((num_rows, len(w.weight)), float("nan"), dtype=out_dtype, device=CUDA)
    x = (residual * gain).to(dtype)
    exact = x.double() * torch.rsqrt(residual.double().square().mean(1, keepdim=True) + EPS)
    links = [ChainLink(name, x, w, out, squares=squares, num_squares=12)]
    for launch in range(2):
        chain(launch, links, EPS)
    assert relative_error(out, times(exact, w)) < TOLERANCE


@pytest.mark.parametrize("num_rows", ROWS)
def test_chain_between_two_attentions(made: Made, num_rows: int) -> None:
    chain, dtype = made
    attended, residual = random(dtype, num_rows, QUERIES), random(dtype, num_rows, HIDDEN)
    gains = random(dtype, HIDDEN), random(dtype, HIDDEN)
    o, gate_up = weight(dtype, HIDDEN, QUERIES), weight(dtype, 2 * INTER, HIDDEN)
    down, qkv = weight(dtype, HIDDEN, INTER, has_bias=False), weight(dtype, QKV, HIDDEN)
    expected = residual.double() + times(attended, o)
    gate, up = times(normed(expected, gains[0]), gate_up).chunk(2, dim=1)
    expected = expected + times(torch.nn.functional.silu(gate) * up, down)

    scaled, gated = torch.empty_like(residual), random(dtype, num_rows, INTER)
    out = torch.full((num_rows, QKV), float("nan"), dtype=dtype, device=CUDA)
    squares = torch.full((256, size_of(num_rows)), float("nan"), device=CUDA)
    seen = []
    for again in range(20):
        stream = residual.clone()
        links = [
            ChainLink("o", attended, o, scaled, None, 0, stream, gains[0], squares),
            ChainLink("gate_up", scaled, gate_up, gated, squares, chain.num_squares("o", num_rows)),
            ChainLink("down", gated, down, scaled, None, 0, stream, gains[1], squares),
            ChainLink("qkv", scaled, qkv, out, squares, chain.num_squares("down", num_rows)),
        ]
        chain(again % 2, links, EPS)
        seen.append((stream, out.clone()))
    assert relative_error(seen[0][0], expected) < TOLERANCE
    assert relative_error(seen[0][1], times(normed(expected, gains[1]), qkv)) < 2 * TOLERANCE
    for stream, last in seen[1:]:
        assert torch.equal(stream, seen[0][0]) and torch.equal(last, seen[0][1]), "the same bits every time"


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_all_blocks_that_fit_are_of_whole_clusters(cluster: int) -> None:
    skip_unless_hopper()
    room = resident_blocks(CUDA, CLUSTERS, SHARED_BYTES)[cluster]
    assert 0 < room <= torch.cuda.get_device_properties(CUDA).multi_processor_count and room % cluster == 0
