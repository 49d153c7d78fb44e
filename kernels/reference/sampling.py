"""Sampling by Gumbel-max with counter-based noise.

The noise of a token is splitmix64 of (seed, position, vocabulary index) and of nothing else, so a request
samples the same tokens alone, in a batch, after a retraction, or on another worker. Rows are computed one
at a time, each with operations whose shapes depend on that row only: not even rounding depends on the
others.

Source of the generator: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
# A nucleus is nearly always among this many best tokens: sorting them beats sorting the vocabulary.
NUCLEUS_CANDIDATES = 1024


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
) -> Tensor:
    token_ids = logits.argmax(dim=-1)
    random_rows = temperature.gt(0.0).nonzero().flatten()
    if random_rows.numel() == 0:
        return token_ids
    keys = splitmix64(splitmix64(seed) + position)
    for row in random_rows.tolist():
        best = logits[row, token_ids[row]]
        if not best.isfinite():
            continue  # nothing is allowed, or one token outweighs all others without bound
        # The best logit becomes 0: no temperature can overflow, and a ratio of probabilities is a difference.
        scores = (logits[row] - best) / temperature[row]
        candidates = _candidates(scores, int(top_k[row]), float(top_p[row]), float(min_p[row]))
        token_ids[row] = _gumbel_argmax(scores, candidates, keys[row])
    return token_ids


def sample_to_slots(
    logits: Tensor,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    slot: Tensor,
    last_token: Tensor,
    results: Tensor,
    turn: Tensor,
) -> None:
    off = torch.zeros_like(seed)
    ones, zeros = torch.ones_like(temperature), torch.zeros_like(temperature)
    tokens = sample(logits, temperature, off, ones, zeros, seed, position)
    last_token[slot] = tokens
    results[int(turn[0]), : len(tokens)] = tokens


def apply_bitmask(logits: Tensor, bitmask: Tensor, rows: Tensor) -> None:
    tokens = torch.arange(logits.shape[1], device=logits.device)
    allowed = (bitmask[:, tokens // 32] >> (tokens % 32)) & 1
    logits[rows] = logits[rows].masked_fill(allowed == 0, float("-inf"))


def splitmix64(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64 that stand for uint64; in place on two buffers, for speed."""
    z = x + GOLDEN
    shifted = torch.empty_like(z)
    z ^= _shift_right(z, 30, shifted)
    z *= MIX_1
    z ^= _shift_right(z, 27, shifted)
    z *= MIX_2
    z ^= _shift_right(z, 31, shifted)
    return z


def _shift_right(x: Tensor, bits: int, out: Tensor) -> Tensor:
    """Logical shift: torch's own keeps the sign."""
    torch.bitwise_right_shift(x, bits, out=out)
    out &= (1 << (64 - bits)) - 1
    return out


def gumbel_noise(key: Tensor, vocab_ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float64, finite: 52 random bits put u strictly between 0 and 1."""
    random_bits = splitmix64((vocab_ids * GOLDEN).add_(key))
    uniform = _shift_right(random_bits, 12, random_bits).to(torch.float64).add_(0.5).mul_(2.0**-52)
    return uniform.log_().neg_().log_().neg_()


def _gumbel_argmax(scores: Tensor, candidates: Tensor | None, key: Tensor) -> Tensor:
    if candidates is None:
        vocab_ids = torch.arange(scores.numel(), device=scores.device)
        return gumbel_noise(key, vocab_ids).add_(scores).argmax()
    return candidates[gumbel_noise(key, candidates).add_(scores[candidates]).argmax()]


def _candidates(scores: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor | None:
    """Ids of the tokens that pass the filters, in Hugging Face's order; None: all of them."""
    candidates = None
    if 0 < top_k < scores.numel():
        candidates = (scores >= scores.topk(top_k).values[-1]).nonzero().flatten()
    if top_p < 1.0:
        candidates = _nucleus(scores, candidates, top_p)
    if min_p > 0.0:
        floor = math.log(min_p)
        if candidates is None:
            candidates = (scores >= floor).nonzero().flatten()
        else:
            candidates = candidates[scores[candidates] >= floor]
    return candidates


def _nucleus(scores: Tensor, candidates: Tensor | None, top_p: float) -> Tensor:
    """The fewest best candidates whose probabilities sum to at least `top_p`; never none."""
    pool = scores if candidates is None else scores[candidates]
    total = pool.double().exp_().sum()
    count = min(NUCLEUS_CANDIDATES, pool.numel())
    best, order = pool.topk(count)
    mass = best.double().exp_().cumsum(0).div_(total)
    if count < pool.numel() and mass[-1] < top_p:
        best, order = pool.sort(descending=True, stable=True)
        mass = best.double().exp_().cumsum(0).div_(total)
    num_kept = int((mass < top_p).sum()) + 1
    kept = order[:num_kept]
    return kept if candidates is None else candidates[kept]
