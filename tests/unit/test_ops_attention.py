"""Paged attention agrees with attention written out in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from phloem.kernels import ops

NUM_TOKENS_IN_POOL = 256
# (query_len, kv_len): whole prompts, chunks on a prefix, decode steps, one page and many.
RAGGED = [(5, 5), (1, 40), (7, 30), (16, 16), (1, 1), (1, 17), (3, 19)]


class Case(NamedTuple):
    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    page_table: Tensor


def make_case(
    lens: list[tuple[int, int]], heads: tuple[int, int], head_dim: int, page_size: int, scattered: bool
) -> Case:
    generator = torch.Generator().manual_seed(0)
    num_pages = NUM_TOKENS_IN_POOL // page_size
    shape = (num_pages, page_size, heads[1], head_dim)
    free = torch.randperm(num_pages, generator=generator) if scattered else torch.arange(num_pages)
    page_table = torch.zeros(len(lens), max(-(-kv // page_size) for _, kv in lens), dtype=torch.int64)
    taken = 0
    for row, (_, kv_len) in enumerate(lens):
        count = -(-kv_len // page_size)
        page_table[row, :count] = free[taken : taken + count]
        taken += count
    num_queries = sum(query_len for query_len, _ in lens)
    return Case(
        torch.randn(num_queries, heads[0], head_dim, generator=generator),
        torch.randn(shape, generator=generator),
        torch.randn(shape, generator=generator),
        page_table,
    )


def naive_attention(case: Case, lens: list[tuple[int, int]], window: int, scale: float) -> Tensor:
    page_size, num_kv_heads = case.k_pages.shape[1:3]
    group = case.q.shape[1] // num_kv_heads
    rows = iter(case.q.double())
    result = []
    for pages, (query_len, kv_len) in zip(case.page_table, lens, strict=True):
        slots = [int(pages[t // page_size]) * page_size + t % page_size for t in range(kv_len)]
        keys = case.k_pages.double().flatten(0, 1)[slots].repeat_interleave(group, 1)
        values = case.v_pages.double().flatten(0, 1)[slots].repeat_interleave(group, 1)
        for position in range(kv_len - query_len, kv_len):
            seen = slice(max(0, position - window + 1) if window else 0, position + 1)
            weights = (torch.einsum("hd,thd->ht", next(rows), keys[seen]) * scale).softmax(-1)
            result.append(torch.einsum("ht,thd->hd", weights, values[seen]))
    return torch.stack(result)


def run(case: Case, lens: list[tuple[int, int]], window: int, scale: float) -> Tensor:
    page_size = case.k_pages.shape[1]
    query_lens, kv_lens = [q for q, _ in lens], [kv for _, kv in lens]
    plan = ops.plan_attention(query_lens, kv_lens, case.page_table, page_size, window)
    return ops.paged_attention(case.q, case.k_pages, case.v_pages, plan, scale)


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (8, 1)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_paged_attention_agrees_with_float64(
    head_dim: int, heads: tuple[int, int], page_size: int, scattered: bool
) -> None:
    case = make_case(RAGGED, heads, head_dim, page_size, scattered)
    expected = naive_attention(case, RAGGED, 0, head_dim**-0.5)
    torch.testing.assert_close(run(case, RAGGED, 0, head_dim**-0.5).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("window", [1, 4, 16, 18, 100])
def test_window_hides_older_tokens(window: int, page_size: int) -> None:
    case = make_case(RAGGED, (6, 2), 64, page_size, scattered=True)
    expected = naive_attention(case, RAGGED, window, 0.2)
    torch.testing.assert_close(run(case, RAGGED, window, 0.2).double(), expected, rtol=1e-5, atol=1e-5)


def test_decode_batches_of_equal_and_unequal_lengths_agree_with_float64() -> None:
    for lens in ([(1, 33)] * 4, [(1, kv) for kv in (1, 2, 16, 17, 32, 33, 48, 5)]):
        case = make_case(lens, (9, 3), 64, 16, scattered=True)
        expected = naive_attention(case, lens, 0, 0.125)
        torch.testing.assert_close(run(case, lens, 0, 0.125).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_sequence_does_not_depend_on_what_lies_after_it_in_its_last_page() -> None:
    lens = [(1, 18), (4, 21)]
    case = make_case(lens, (4, 2), 64, 16, scattered=True)
    before = run(case, lens, 0, 0.125)
    for row, (_, kv_len) in enumerate(lens):
        page = int(case.page_table[row, kv_len // 16])
        case.k_pages[page, kv_len % 16 :] = float("nan")
        case.v_pages[page, kv_len % 16 :] = float("nan")
    assert torch.equal(run(case, lens, 0, 0.125), before)


def test_bfloat16_stays_close_to_float64() -> None:
    case = make_case(RAGGED, (8, 2), 64, 16, scattered=True)
    low = Case(case.q.bfloat16(), case.k_pages.bfloat16(), case.v_pages.bfloat16(), case.page_table)
    found, expected = run(low, RAGGED, 0, 0.125), naive_attention(low, RAGGED, 0, 0.125)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)
