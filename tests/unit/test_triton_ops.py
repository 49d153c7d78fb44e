"""The Triton kernels in Triton's interpreter, against the reference. CUDA runs them in `tests/gpu`."""

from __future__ import annotations

import pytest
import torch

from phloem.kernels.reference import pages, sampling
from phloem.kernels.triton_ops import activation as triton_activation
from phloem.kernels.triton_ops import decode_begin
from phloem.kernels.triton_ops import norm as triton_norm
from phloem.kernels.triton_ops import pages as triton_pages
from phloem.kernels.triton_ops import rope as triton_rope
from phloem.kernels.triton_ops import sampling as triton_sampling
from phloem.kernels.triton_ops.lane import TritonLane
from tests.support.device_ops import HEADS, Heads, PagedBatch
from tests.support.op_checks import (
    LayerOps,
    check_activation,
    check_attention,
    check_norm_of_some_heads,
    check_norms,
    check_pages,
    check_rope,
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels for real")

CPU = torch.device("cpu")


TRITON = LayerOps(
    triton_norm.rms_norm,
    triton_norm.add_rms_norm,
    triton_activation.act_mul,
    triton_rope.rope_write_kv,
    triton_pages.gather_pages,
    triton_pages.scatter_pages,
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The interpreter multiplies bfloat16 matrices as integers; float16 stands for both, CUDA has all three.
DOT_DTYPES = [torch.float32, torch.float16]


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("heads", HEADS)
def test_attention_agrees_with_the_reference(heads: Heads, page_size: int, dtype: torch.dtype) -> None:
    check_attention(
        lambda batch: triton_attention(batch, heads),
        heads,
        page_size,
        dtype,
        CPU,
        query_lens=(1, 5, 33, 1),
        kv_lens=(1, 40, 33, 70),
    )


def test_attention_sees_only_the_window() -> None:
    heads = Heads(8, 2, 64)
    check_attention(
        lambda batch: triton_attention(batch, heads, window=7),
        heads,
        16,
        torch.float32,
        CPU,
        query_lens=(1, 20, 33),
        kv_lens=(90, 40, 33),
        window=7,
    )


def triton_attention(batch: PagedBatch, heads: Heads, window: int = 0) -> torch.Tensor:
    lane = TritonLane(CPU, window=window, max_rows=6, max_pages=80)
    out = torch.full_like(batch.q, float("nan"))
    plan = lane.plan(batch.query_lens, batch.kv_lens, batch.page_table.numpy())
    plan.attend(batch.q, batch.k_pages, batch.v_pages, heads.head_dim**-0.5, out)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("page_size", "joined"), [(4, True), (1, False), (16, True)])
@pytest.mark.parametrize("heads", HEADS)
def test_rope_and_kv_write_agree_with_the_reference(
    heads: Heads, page_size: int, joined: bool, dtype: torch.dtype
) -> None:
    check_rope(TRITON, dtype, CPU, heads, page_size, joined=joined)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [96, 576, 2048])
def test_norms_and_activation_agree_with_the_reference(width: int, dtype: torch.dtype) -> None:
    check_norms(TRITON, dtype, CPU, 7, width)
    check_activation(TRITON, dtype, CPU, 7, width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_norm_of_heads_agrees_with_the_reference(heads: Heads, dtype: torch.dtype) -> None:
    check_norm_of_some_heads(TRITON, dtype, CPU, heads)


@pytest.mark.parametrize("layers", [(0, 3), (1, 2), (2, 2)])
@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_move_with_the_references_digest(
    dtype: torch.dtype, page_size: int, layers: tuple[int, int]
) -> None:
    check_pages(TRITON, dtype, CPU, Heads(4, 2, 64), page_size, layers=layers)


def test_sampled_tokens_are_the_references() -> None:
    rows, vocab = 6, 5000
    logits = torch.randn(rows, vocab) * 3
    temperature = torch.tensor([0.0, 1.0, 0.7, 2.0, 1.0, 0.3])
    top_k = torch.tensor([0, 5, 0, 0, 50, 0])
    top_p = torch.tensor([1.0, 1.0, 0.5, 1.0, 0.9, 1.0])
    min_p = torch.tensor([0.0, 0.0, 0.0, 0.05, 0.01, 0.0])
    seed = torch.randint(-(2**62), 2**62, (rows,))
    for step in range(10):
        position = torch.arange(rows) + 7 * step
        filters = (logits, temperature, top_k, top_p, min_p, seed, position)
        out = triton_sampling.sample(*filters, all_greedy=False, no_filters=False)
        assert torch.equal(out, sampling.sample(*filters))
    plain = (logits, temperature, top_k * 0, top_p * 0 + 1, min_p * 0, seed, torch.arange(rows))
    out = triton_sampling.sample(*plain, all_greedy=False, no_filters=True)
    assert torch.equal(out, sampling.sample(*plain))


def test_greedy_takes_the_first_of_equal_tokens() -> None:
    logits = torch.zeros(3, 5000)
    logits[1, 4321] = logits[1, 77] = 2.0
    zeros, ids = torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    out = triton_sampling.sample(logits, zeros, ids, zeros, zeros, ids, ids, all_greedy=True, no_filters=True)
    assert out.tolist() == [0, 77, 0]


@pytest.mark.parametrize("all_greedy", [False, True])
def test_tokens_go_to_their_slots_and_to_the_turns_results(all_greedy: bool) -> None:
    rows, vocab = 5, 5000
    logits = torch.randn(rows, vocab) * 3
    logits[3] = float("-inf")  # nothing is allowed: token 0
    logits[4, 4999] = float("inf")
    temperature = torch.tensor([0.0, 1.0, 0.7, 0.5, 0.9]) * (not all_greedy)
    seed, position = torch.randint(-(2**62), 2**62, (rows,)), torch.arange(rows) + 40
    slot = torch.tensor([6, 0, 3, 5, 1])
    found, expected = (
        (torch.full((8,), -7), torch.full((3, 9), -7)) for _ in range(2)
    )  # of each: by slot, by turn
    drawn = (logits, temperature, seed, position, slot)
    turn = torch.tensor([2, 0], dtype=torch.int32)
    triton_sampling.sample_to_slots(*drawn, *found, turn, all_greedy=all_greedy)
    sampling.sample_to_slots(*drawn, *expected, turn)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert found[1][2, 3] == 0 and found[1][2, 4] == 4999


@pytest.mark.parametrize("count", [0, 1, 300, 5000])
def test_pages_are_placed_up_to_the_count(count: int) -> None:
    table = torch.zeros((60, 100), dtype=torch.int32)
    expected = table.clone()
    places = torch.randperm(6000)[:5500]
    pairs = torch.stack((places, places + 9), dim=1).to(torch.int32)
    header = torch.tensor([count, 1], dtype=torch.int32)
    decode_begin.place_pages(table, header, pairs)
    pages.place_pages(expected, header, pairs)
    assert torch.equal(table, expected) and int((table > 0).sum()) == count


def test_bitmask_forbids_exactly_the_zero_bits() -> None:
    logits = torch.randn(5, 5000)
    mask = torch.randint(-(2**31), 2**31 - 1, (2, 157), dtype=torch.int32)
    bits = ((mask[:, :, None] >> torch.arange(32)) & 1).reshape(2, -1)[:, :5000].bool()
    expected = logits.clone()
    expected[4][~bits[0]] = expected[1][~bits[1]] = float("-inf")
    triton_sampling.apply_bitmask(logits, mask, torch.tensor([4, 1]))
    assert torch.equal(logits, expected)
