"""Top-k, top-p and min-p by Triton's interpreter: which tokens stay, beside sorting them all."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from phloem.kernels.triton_ops.thresholds import mass_bits, thresholds

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels for real")

ROWS = 4


def kept(scores: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Of one row: the tokens that stay, with all that tie with the last one."""
    ranked = scores.sort(descending=True).values
    least = ranked[min(top_k, len(ranked)) - 1] if top_k else ranked[-1]
    masses = ranked.double().exp() * (ranked >= least)
    before = masses.cumsum(0) - masses
    if top_p < 1.0:
        least = torch.maximum(least, ranked[before < top_p * masses.sum()][-1])
    return scores >= max(float(least), math.log(min_p) if min_p else -math.inf)


def largest_of(logits: Tensor, block: int) -> Tensor:
    padded = torch.nn.functional.pad(logits, (0, -logits.shape[1] % block), value=-math.inf)
    return padded.view(len(logits), -1, block).max(dim=-1).values


@pytest.mark.parametrize("block", [16, 2048], ids=lambda block: f"blocks-of-{block}")
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["spread", "ties", "masked", "flat"])
def test_those_stay_that_sorting_keeps(kind: str, seed: int, block: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    vocab = int(rand() * 3000) + 3  # tiles that are not full, and rows of less than one
    logits = torch.randn((ROWS, vocab), generator=generator) * {"flat": 0.01}.get(kind, 4.0)
    if kind == "ties":
        logits = logits.round()
    if kind == "masked":
        logits[:, 1::2] = -math.inf
    temperature, top_p = rand(ROWS) + 0.2, rand(ROWS)
    top_k = (rand(ROWS) * (vocab + 2 if block > 16 else 40)).long()  # more and fewer than there are blocks
    min_p = torch.where(rand(ROWS) < 0.5, rand(ROWS) * 0.1, 0.0)
    top_p[seed % ROWS], top_k[(seed + 1) % ROWS] = 1.0, 0
    found = thresholds(logits, largest_of(logits, block), temperature, top_k, top_p, min_p)
    scores = (logits - logits.max(dim=-1).values[:, None]) / temperature[:, None]
    for row in range(ROWS):
        expected = kept(scores[row], int(top_k[row]), float(top_p[row]), float(min_p[row]))
        assert torch.equal(scores[row] >= found[row], expected)


def test_rows_that_are_not_sampled_or_not_filtered_keep_all() -> None:
    logits = torch.randn(3, 50)
    logits[1] = -math.inf
    ones, zeros = torch.ones(3), torch.zeros(3)
    largest = largest_of(logits, 16)
    top_k, top_p = torch.tensor([5, 5, 0]), torch.tensor([0.5, 0.5, 1.0])
    found = thresholds(logits, largest, torch.tensor([0.0, 1.0, 1.0]), top_k, top_p, zeros)
    assert found.tolist() == [-math.inf] * 3
    assert thresholds(logits, largest, ones, top_k * 0, ones, ones / 2)[2] == pytest.approx(math.log(0.5))


@pytest.mark.parametrize("vocab", [2, 50_000, 2**17, 2**18 - 1, 2**18, 2**20])
def test_the_masses_of_a_flat_vocabulary_do_not_overflow(vocab: int) -> None:
    assert 2**59 < vocab * 2 ** mass_bits(vocab) < 2**63 or mass_bits(vocab) == 44


@pytest.mark.parametrize("top_k", [50, 51, 2**31, -1])
def test_as_many_as_there_are_filter_nothing(top_k: int) -> None:
    logits, one = torch.randn(1, 50), torch.ones(1)
    found = thresholds(logits, largest_of(logits, 16), one, torch.tensor([top_k]), one, 0 * one)
    assert found.tolist() == [-math.inf]


def test_rows_with_an_infinite_logit_are_not_filtered() -> None:
    logits, one = torch.randn(1, 50), torch.ones(1)
    logits[0, 7] = math.inf
    found = thresholds(logits, largest_of(logits, 16), one, torch.tensor([5]), 0.5 * one, 0 * one)
    assert found.tolist() == [-math.inf]


def test_no_rows_are_fine() -> None:
    none = torch.zeros(0)
    assert thresholds(torch.zeros(0, 50), torch.zeros(0, 4), none, none.long(), none, none).shape == (0,)


def test_what_can_not_be_in_a_nucleus_is_in_its_mass_all_the_same() -> None:
    vocab = 60_000
    logits = torch.full((1, vocab), -12.8)  # together 0.17, beside the 1 and 0.61 of these two
    logits[0, :2] = torch.tensor([0.0, -0.5])
    one, largest = torch.ones(1), largest_of(logits, 2048)
    for top_p, num_kept in ((0.55, 1), (0.59, 2)):  # the first has 0.564 of all, but 0.622 of the two
        assert math.log((1 - top_p) / (2 * vocab)) > -12.8, "it is below what is looked at"
        found = thresholds(logits, largest, one, torch.tensor([0]), top_p * one, 0 * one)
        assert (logits[0] >= found).sum() == num_kept
