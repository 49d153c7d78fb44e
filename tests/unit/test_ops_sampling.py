"""Sampling: the right distribution, and the same token whatever else is in the batch."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from scipy import stats
from torch import Tensor

from phloem.kernels import ops

VOCAB = 40
NUM_DRAWS = 4000
SIGNIFICANCE = 1e-4  # seeds are fixed: a pass stays a pass


class Params(NamedTuple):
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def make_logits(num_rows: int = 1, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2.0


def sample(
    logits: Tensor, params: list[Params], seeds: list[int] | Tensor, positions: list[int] | Tensor
) -> Tensor:
    columns = list(zip(*params, strict=True))
    return ops.sample(
        logits,
        torch.tensor(columns[0], dtype=torch.float32),
        torch.tensor(columns[1], dtype=torch.int64),
        torch.tensor(columns[2], dtype=torch.float32),
        torch.tensor(columns[3], dtype=torch.float32),
        torch.as_tensor(seeds, dtype=torch.int64),
        torch.as_tensor(positions, dtype=torch.int64),
    )


def expected_probabilities(logits: Tensor, params: Params) -> list[float]:
    """Hugging Face's definition, token by token, in float64 lists."""
    scores = [score / params.temperature for score in logits.double().tolist()]
    allowed = set(range(len(scores)))
    if params.top_k > 0:
        kth = sorted(scores, reverse=True)[params.top_k - 1]
        allowed = {i for i in allowed if scores[i] >= kth}
    if params.top_p < 1.0:
        total, mass, kept = sum(math.exp(scores[i]) for i in allowed), 0.0, set()
        for i in sorted(allowed, key=lambda i: -scores[i]):
            kept.add(i)
            mass += math.exp(scores[i]) / total
            if mass >= params.top_p:
                break
        allowed = kept
    best = max(scores)
    allowed = {i for i in allowed if math.exp(scores[i] - best) >= params.min_p}
    weights = [math.exp(score) if i in allowed else 0.0 for i, score in enumerate(scores)]
    return [weight / sum(weights) for weight in weights]


FILTERS = [
    Params(),
    Params(temperature=0.5),
    Params(temperature=1.7),
    Params(top_k=5),
    Params(top_p=0.8),
    Params(min_p=0.1),
    Params(temperature=1.3, top_k=12, top_p=0.9, min_p=0.05),
]


def assert_distributed(tokens: Tensor, probabilities: list[float]) -> None:
    counts = tokens.bincount(minlength=len(probabilities)).tolist()
    forbidden = [i for i, p in enumerate(probabilities) if p == 0.0 and counts[i]]
    assert forbidden == []
    # Rare tokens share one cell: chi-square wants about five expected counts in each.
    cells = [(c, p * NUM_DRAWS) for c, p in zip(counts, probabilities, strict=True) if p * NUM_DRAWS >= 5]
    rare_count, rare_expected = NUM_DRAWS - sum(c for c, _ in cells), NUM_DRAWS - sum(e for _, e in cells)
    if rare_expected > 1.0:
        cells.append((rare_count, rare_expected))
    observed, expected = zip(*cells, strict=True)
    scaled = [e * sum(observed) / sum(expected) for e in expected]
    assert stats.chisquare(observed, scaled).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("params", FILTERS, ids=str)
def test_positions_of_one_seed_draw_from_the_filtered_softmax(params: Params) -> None:
    logits = make_logits()
    tokens = sample(
        logits.expand(NUM_DRAWS, -1), [params] * NUM_DRAWS, [1234] * NUM_DRAWS, torch.arange(NUM_DRAWS)
    )
    assert_distributed(tokens, expected_probabilities(logits[0], params))


def test_neighbouring_seeds_draw_from_the_softmax() -> None:
    logits = make_logits()
    tokens = sample(
        logits.expand(NUM_DRAWS, -1), [Params()] * NUM_DRAWS, torch.arange(NUM_DRAWS), [7] * NUM_DRAWS
    )
    assert_distributed(tokens, expected_probabilities(logits[0], Params()))


def test_successive_positions_are_independent() -> None:
    logits = torch.zeros(1, 4)
    tokens = sample(
        logits.expand(NUM_DRAWS, -1), [Params()] * NUM_DRAWS, [5] * NUM_DRAWS, torch.arange(NUM_DRAWS)
    )
    pairs = (tokens[:-1] * 4 + tokens[1:]).bincount(minlength=16)
    assert stats.chisquare(pairs.tolist()).pvalue > SIGNIFICANCE


def test_a_row_draws_the_same_alone_and_in_any_batch() -> None:
    params = [*FILTERS, Params(temperature=0.0)] * 2
    count = len(params)
    logits = make_logits(count, vocab=50_000)
    seeds, positions = list(range(count)), [3 * i for i in range(count)]
    together = sample(logits, params, seeds, positions)
    alone = [
        sample(logits[i : i + 1], params[i : i + 1], seeds[i : i + 1], positions[i : i + 1])
        for i in range(count)
    ]
    reversed_rows = sample(logits.flip(0), params[::-1], seeds[::-1], positions[::-1]).flip(0)
    assert together.tolist() == [int(token) for token in alone] == reversed_rows.tolist()


def test_seed_and_position_decide_the_token() -> None:
    logits = make_logits(vocab=1000).expand(64, -1)
    first = sample(logits, [Params()] * 64, [9] * 64, torch.arange(64))
    again = sample(logits, [Params()] * 64, [9] * 64, torch.arange(64))
    other_seed = sample(logits, [Params()] * 64, [10] * 64, torch.arange(64))
    other_position = sample(logits, [Params()] * 64, [9] * 64, torch.arange(64) + 1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other_seed)
    assert torch.equal(first[1:], other_position[:-1])


def splitmix64(x: int) -> int:
    z = (x + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_noise_is_the_documented_function_of_seed_position_and_token() -> None:
    """A request resumed on another worker goes on with the same tokens: the noise must never change."""
    seeds, positions, vocab = [0, 0, 1, -1, 2**63 - 1, -(2**63)], [0, 1, 0, 5, 8192, 3], 5000
    tokens = sample(torch.zeros(6, vocab), [Params()] * 6, seeds, positions)
    keys = [splitmix64(splitmix64(seed % 2**64) + at) for seed, at in zip(seeds, positions, strict=True)]
    # Gumbel noise grows with the bits that it is made of; a flat row takes the token with the most.
    noise = [[splitmix64(key + token * 0x9E3779B97F4A7C15) for token in range(vocab)] for key in keys]
    expected = [bits.index(max(bits)) for bits in noise]
    assert tokens.tolist() == expected


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
def test_extreme_seeds_and_positions_are_fine(seed: int) -> None:
    tokens = sample(make_logits(2), [Params()] * 2, [seed] * 2, [0, 2**63 - 1])
    assert bool(((tokens >= 0) & (tokens < VOCAB)).all())


def test_temperature_zero_takes_the_first_of_the_best_whatever_the_filters() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 0.0], [2.0, 1.0, 0.0, 2.0]])
    params = [Params(temperature=0.0), Params(temperature=0.0, top_k=3, top_p=0.5, min_p=0.3)]
    assert sample(logits, params, [1, 2], [3, 4]).tolist() == [1, 0]


def test_tiny_temperature_and_tight_filters_take_the_best_token() -> None:
    logits = make_logits(4)
    params = [Params(temperature=1e-30), Params(top_k=1), Params(top_p=0.0), Params(min_p=1.0)]
    assert torch.equal(sample(logits, params, [1, 2, 3, 4], [0] * 4), logits.argmax(-1))


def test_ties_with_the_kth_token_stay() -> None:
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, -5.0]]).expand(400, -1)
    tokens = sample(logits, [Params(top_k=2)] * 400, [1] * 400, torch.arange(400))
    assert set(tokens.tolist()) == {0, 1, 2, 3}


def test_masked_tokens_are_never_drawn_and_an_all_masked_row_gives_token_zero() -> None:
    logits = torch.full((3, VOCAB), -math.inf)
    logits[0, 17] = -3.0
    params = [Params(temperature=2.0), Params(), Params(top_k=4, top_p=0.5, min_p=0.1)]
    assert sample(logits, params, [1, 2, 3], [0, 0, 0]).tolist() == [17, 0, 0]


def test_a_nucleus_wider_than_the_candidates_is_exact() -> None:
    """A flat distribution over 5000 tokens: 90 % of it cannot fit into the 1024 best."""
    logits = torch.linspace(0.0, 0.5, 5000).expand(100, -1)
    probabilities = expected_probabilities(logits[0], Params(top_p=0.9))
    tokens = sample(logits, [Params(top_p=0.9)] * 100, [8] * 100, torch.arange(100))
    allowed = {i for i, p in enumerate(probabilities) if p > 0.0}
    assert len(allowed) > 1024
    assert set(tokens.tolist()) <= allowed
    assert min(tokens.tolist()) < 5000 - 2 * 1024


def test_logits_are_left_as_they_are() -> None:
    logits = make_logits(3)
    before = logits.clone()
    sample(logits, [Params(top_k=3), Params(top_p=0.5), Params(temperature=0.0)], [1, 2, 3], [0, 0, 0])
    assert torch.equal(logits, before)


def test_bitmask_forbids_exactly_the_zero_bits_of_its_rows() -> None:
    vocab = 70
    logits = make_logits(4, vocab)
    before = logits.clone()
    allowed = torch.rand(2, vocab) < 0.5
    words = torch.zeros(2, 3, dtype=torch.int64)
    for token in range(vocab):
        words[:, token // 32] |= allowed[:, token].long() << (token % 32)
    bitmask = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    ops.apply_bitmask(logits, bitmask, torch.tensor([3, 1]))
    assert torch.equal(logits[[0, 2]], before[[0, 2]])
    expected = before[[3, 1]].masked_fill(~allowed, -math.inf)
    assert torch.equal(logits[[3, 1]], expected)
