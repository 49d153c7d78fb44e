"""Pages through staging: layout, round trip, and what the digest notices."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from phloem.kernels import ops

NUM_LAYERS, NUM_PAGES = 4, 12


class Pages(NamedTuple):
    k: list[Tensor]
    v: list[Tensor]


def make_pages(page_size: int = 16, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Pages:
    generator = torch.Generator().manual_seed(seed)
    shape = (NUM_PAGES, page_size, 3, 64)
    planes = [torch.randn(shape, generator=generator).to(dtype) for _ in range(2 * NUM_LAYERS)]
    return Pages(planes[::2], planes[1::2])


def staging_for(pages: Pages, num_pages: int, num_layers: int, spare: int = 0) -> Tensor:
    one = pages.k[0][0]
    return torch.full((2 * num_layers * num_pages * one.numel() * one.element_size() + spare,), 9).byte()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page_size", [1, 16])
def test_scatter_restores_what_gather_took(page_size: int, dtype: torch.dtype) -> None:
    source, target = make_pages(page_size, dtype), make_pages(page_size, dtype, seed=1)
    untouched = [plane.clone() for plane in target.k]
    page_ids, target_ids = torch.tensor([7, 2, 5]), torch.tensor([0, 11, 3])
    staging = staging_for(source, 3, 2)

    sent = ops.gather_pages(source, page_ids, 1, 3, staging)
    received = ops.scatter_pages(target, target_ids, 1, 3, staging)

    assert sent == received
    for layer in (1, 2):
        assert torch.equal(target.k[layer][target_ids], source.k[layer][page_ids])
        assert torch.equal(target.v[layer][target_ids], source.v[layer][page_ids])
    others = [page for page in range(NUM_PAGES) if page not in target_ids.tolist()]
    assert torch.equal(target.k[1][others], untouched[1][others])
    assert torch.equal(target.k[0], untouched[0])
    assert torch.equal(target.k[3], untouched[3])


def test_staging_is_laid_out_by_layer_then_k_then_v_then_page() -> None:
    pages = make_pages(dtype=torch.float32)
    page_ids = torch.tensor([4, 1])
    staging = staging_for(pages, 2, 2)
    ops.gather_pages(pages, page_ids, 2, 4, staging)
    expected = torch.stack([torch.stack([pages.k[i][page_ids], pages.v[i][page_ids]]) for i in (2, 3)])
    assert torch.equal(staging.view(torch.float32), expected.flatten())


def test_bytes_past_the_pages_are_neither_written_nor_digested() -> None:
    pages = make_pages()
    page_ids = torch.tensor([4, 1])
    exact, roomy = staging_for(pages, 2, 1), staging_for(pages, 2, 1, spare=40)
    assert ops.gather_pages(pages, page_ids, 0, 1, exact) == ops.gather_pages(pages, page_ids, 0, 1, roomy)
    assert torch.equal(roomy[: exact.numel()], exact)
    assert bool((roomy[exact.numel() :] == 9).all())


def digest_of(data: Tensor) -> int:
    """The digest that scatter reports for `data`, a whole number of 6144-byte pages twice."""
    pages = Pages([torch.zeros(32, 16, 3, 64, dtype=torch.bfloat16)], [torch.zeros(32, 16, 3, 64).bfloat16()])
    return ops.scatter_pages(pages, torch.arange(data.numel() // 12288), 0, 1, data)


@pytest.fixture
def data() -> Tensor:
    return torch.randint(0, 256, (12288 * 5,), generator=torch.Generator().manual_seed(3)).byte()


@pytest.mark.parametrize("position", [0, 7, 8, 8191, 8192, 40_000, 61_439])
def test_digest_notices_one_altered_bit(data: Tensor, position: int) -> None:
    before = digest_of(data)
    data[position] ^= 0x80
    assert digest_of(data) != before


@pytest.mark.parametrize(("left", "right"), [(0, 1), (0, 1024), (5, 7000), (1023, 1024), (6143, 7679)])
def test_digest_notices_two_swapped_words(data: Tensor, left: int, right: int) -> None:
    before = digest_of(data)
    words = data.view(torch.int64)
    words[[left, right]] = words[[right, left]]
    assert digest_of(data) != before


def test_digest_notices_swapped_pages_and_shifted_data(data: Tensor) -> None:
    before = digest_of(data)
    assert digest_of(data.view(5, -1)[[1, 0, 2, 3, 4]].flatten()) != before
    assert digest_of(data.roll(8)) != before


def test_digest_is_the_documented_sum(data: Tensor) -> None:
    words = data.view(torch.int64).tolist()
    row_step, column_step = -7046029254386353131, -4417276706812531889
    total = sum(
        ((index // 1024 * row_step) | 1) * ((index % 1024 * column_step) | 1) * word
        for index, word in enumerate(words)
    )
    assert digest_of(data) == (total + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("head_dim", [1, 3])
def test_digest_covers_bytes_that_fill_no_word(head_dim: int) -> None:
    pages = Pages([torch.zeros(4, 1, 1, head_dim)], [torch.zeros(4, 1, 1, head_dim)])
    source = torch.arange(1, head_dim * 8 + 1, dtype=torch.uint8)
    before = ops.scatter_pages(pages, torch.tensor([2]), 0, 1, source)
    source[-1] += 1
    assert ops.scatter_pages(pages, torch.tensor([2]), 0, 1, source) != before


def test_no_pages_and_no_layers_have_digest_zero() -> None:
    pages = make_pages()
    empty = torch.empty(0, dtype=torch.uint8)
    assert ops.gather_pages(pages, torch.empty(0, dtype=torch.int64), 0, 2, empty) == 0
    assert ops.gather_pages(pages, torch.tensor([1]), 2, 2, empty) == 0
