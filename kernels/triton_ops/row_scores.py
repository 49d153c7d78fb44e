"""A row's logits by blocks, the scores of its tokens, and bounds on those that pass its filters.

A score is `(logit - best) / temperature`; its magnitude is its float32 bits without the sign. Who draws and
who filters find scores here: the last token of a nucleus must equal its own threshold.
"""

from __future__ import annotations

import triton
import triton.language as tl

_ALL_BITS = tl.constexpr(2**31 - 1)


@triton.jit
def blocks_of(values, row, num_blocks, blocks: tl.constexpr):
    """The row of values `[R, num_blocks]`, `[blocks]`; -inf beyond its end."""
    block = tl.arange(0, blocks)
    return tl.load(values + row * num_blocks + block, mask=block < num_blocks, other=float("-inf"))


@triton.jit
def is_finite(best):
    """Of a row's best logit: else nothing is allowed, or one token outweighs all others without bound."""
    return (best > float("-inf")) & (best < float("inf"))


@triton.jit
def score_of(logit, best, heat):
    return tl.div_rn(logit - best, heat)


@triton.jit
def magnitude_of(score):
    return score.to(tl.int32, bitcast=True) & _ALL_BITS


@triton.jit
def asked(row, largest, temperature, top_k, top_p, vocab):
    """(best logit, temperature, k, p, whether k, whether p filters the row). largest `[B]`: of its blocks."""
    heat, best = tl.load(temperature + row), tl.max(largest, axis=0)
    k, p = tl.load(top_k + row), tl.load(top_p + row)
    is_drawn = (heat > 0.0) & is_finite(best)
    return best, heat, k, p, is_drawn & (k > 0) & (k < vocab), is_drawn & (p < 1.0)


@triton.jit
def worst_of_k(largest, k, best, heat):
    """A magnitude that k tokens do not exceed, one in each of k blocks; the largest with fewer blocks."""
    no_worse = tl.sum((largest[None, :] >= largest[:, None]).to(tl.int32), axis=1)
    kth = tl.max(tl.where(no_worse >= k, largest, float("-inf")), axis=0)
    magnitude = magnitude_of(score_of(kth, best, heat))
    return tl.where(tl.max(no_worse, axis=0) >= k, magnitude, _ALL_BITS)


@triton.jit
def worst_of_p(p, vocab):
    """A magnitude that no token of the nucleus exceeds: the best has mass 1. A half is for the rounding."""
    least = tl.log((1.0 - p.to(tl.float64)) / (2.0 * vocab))
    return magnitude_of(least.to(tl.float32))
