"""Magnitudes of scores, and bounds on those that pass a row's filters: see `thresholds.py`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def asked(row, largest, temperature, top_k, top_p, vocab):
    """(best logit, temperature, k, p, whether k, whether p filters the row). largest `[B]`: of its blocks."""
    heat, best = tl.load(temperature + row), tl.max(largest, axis=0)
    k, p = tl.load(top_k + row), tl.load(top_p + row)
    is_drawn = (heat > 0.0) & (best > float("-inf")) & (best < float("inf"))
    return best, heat, k, p, is_drawn & (k > 0) & (k < vocab), is_drawn & (p < 1.0)


@triton.jit
def blocks_of(largest, row, num_blocks, blocks: tl.constexpr):
    block = tl.arange(0, blocks)
    return tl.load(largest + row * num_blocks + block, mask=block < num_blocks, other=float("-inf"))


@triton.jit
def magnitude_of(logit, best, heat, all_bits: tl.constexpr):
    """(magnitude, score). The kernel that draws finds the same: a nucleus' last token must equal its own."""
    score = tl.div_rn(logit - best, heat)
    return score.to(tl.int32, bitcast=True) & all_bits, score


@triton.jit
def worst_of_k(largest, k, best, heat, all_bits: tl.constexpr):
    """A magnitude that k tokens do not exceed, one in each of k blocks; `all_bits` with fewer blocks."""
    no_worse = tl.sum((largest[None, :] >= largest[:, None]).to(tl.int32), axis=1)
    kth = tl.max(tl.where(no_worse >= k, largest, float("-inf")), axis=0)
    magnitude, _score = magnitude_of(kth, best, heat, all_bits)
    return tl.where(tl.max(no_worse, axis=0) >= k, magnitude, all_bits)


@triton.jit
def worst_of_p(p, vocab, all_bits: tl.constexpr):
    """A magnitude that no token of the nucleus exceeds: the best has mass 1. A half is for the rounding."""
    least = tl.log((1.0 - p.to(tl.float64)) / (2.0 * vocab))
    return least.to(tl.float32).to(tl.int32, bitcast=True) & all_bits
