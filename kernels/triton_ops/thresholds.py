"""Top-k, top-p and min-p as the least score that a token may have, without sorting the vocabulary.

A score is `(logit - best) / temperature`, never above 0: a token's **magnitude** is the score's float32 bits
without the sign, an integer that orders tokens from best to worst. Both filters ask for the smallest
magnitude such that the tokens that have at most that come to a target: to so many, or to so much of the mass.

A radix selection finds it in four rounds over the row: each adds what its tokens bring to the bins of a
histogram, and the next looks for the bin in which the sum reaches the target. The first round's bins are 1/64
of a score wide, so that a row's tokens spread over hundreds of them; the others split one bin by its bits,
down to a single float. Masses are integers, in units of 2**-44 (2**-43 and so on beyond 2**18 tokens): sums
do not depend on the order of additions, so a row keeps the same tokens whatever else is in the batch. Rows
are filtered by top_k first, then by top_p.

Most tokens are never added: a row is made of blocks whose largest logits are known, and k tokens are no worse
than the k-th of those; and what is so improbable that a whole vocabulary of it would have less mass than
top_p leaves out only counts for the mass of all.

Radix selection on GPUs: Zhang et al., "Parallel Top-K Algorithms on GPU" (SC 2023).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from phloem.kernels.triton_ops.row_scores import (
    asked,
    blocks_of,
    magnitude_of,
    score_of,
    worst_of_k,
    worst_of_p,
)

_BINS = tl.constexpr(2048)
_TILE = tl.constexpr(2048)
_ROUNDS = 4
# A round's bin has this many magnitudes, as a power of 2; the first round's have 1/64 of a score each.
_SHIFTS = (0, 19, 8, 0)
_BINS_OF_ONE = tl.constexpr(64.0)
_MASS_BITS = 44
_SIGN = tl.constexpr(-(2**31))
_BEHIND_INFINITY = tl.constexpr(0x7F800000 + 1)
# Of a launch, about: enough programs to fill a device, and not so many that each has little to do.
_PROGRAMS = 1024


@triton.jit
def _first_magnitude(bin_id):
    """Where a bin of the first round begins; the last one has all that is worse, and ends behind infinity."""
    edge = (bin_id.to(tl.float32) * (1.0 / _BINS_OF_ONE)).to(tl.int32, bitcast=True)
    return tl.where(bin_id < _BINS, edge, _BEHIND_INFINITY)


@triton.jit
def _reaching(histogram, before, target):
    """(the bin in which `before` and the bins up to it come to the target, what they come to before it)."""
    bin_id = tl.arange(0, _BINS)
    amount = tl.load(histogram + bin_id)
    is_before = before + tl.cumsum(amount, axis=0) < target
    at = tl.minimum(tl.sum(is_before.to(tl.int32), axis=0), _BINS - 1)
    return at, before + tl.sum(tl.where(bin_id < at, amount, 0), axis=0)


@triton.jit
def _range_of_round(
    histogram,
    found,
    total,
    k,
    p,
    has_k,
    number: tl.constexpr,
    of_p: tl.constexpr,
    last_shift: tl.constexpr,
):
    """(low, high, before, target): magnitudes from low to below high are looked at, what is better comes to
    `before`. `histogram` and `found` are those of the round before, which for top_p's first is top_k's last.
    """
    low = tl.full((), 0, tl.int32)
    high = tl.full((), _BEHIND_INFINITY, tl.int32)
    before = tl.full((), 0, tl.int64)
    target = k
    if number == 0:
        if of_p and has_k:  # what top_k keeps is all there is
            at, _before = _reaching(histogram, tl.load(found + 1), tl.load(found + 2))
            high = tl.load(found).to(tl.int32) + at + 1
    else:
        if of_p and number == 1:
            target = tl.ceil(p.to(tl.float64) * tl.load(total).to(tl.float64)).to(tl.int64)
        elif of_p:
            target = tl.load(found + 2)
        at, before = _reaching(histogram, tl.load(found + 1), target)
        if number == 1:
            low = _first_magnitude(at)
            high = _first_magnitude(at + 1)
        else:
            low = tl.load(found).to(tl.int32) + (at << last_shift)
            high = low + (1 << last_shift)
    return low, high, before, target


@triton.jit(do_not_specialize=["rows", "tiles"])  # one kernel for all batches: nobody waits for a compiler
def _round_kernel(
    logits,
    largest,
    temperature,
    top_k,
    top_p,
    histograms,
    totals,
    found,
    row_stride,
    vocab,
    rows,
    num_blocks,
    tiles,
    number: tl.constexpr,
    of_p: tl.constexpr,
    shift: tl.constexpr,
    last_shift: tl.constexpr,
    mass_bits: tl.constexpr,
    blocks: tl.constexpr,
):
    """Round `number` (0 to 3) of a filter, for `tiles` tiles of a row.

    histograms int64 `[8, R, _BINS]`, and totals int64 `[R]` of the mass, zero at first; found int64 `[8, R,
    3]`: low, before and target of `_range_of_round`. The eight are top_k's four rounds, then top_p's.
    """
    row = tl.program_id(0).to(tl.int64)
    of_blocks = blocks_of(largest, row, num_blocks, blocks)
    best, heat, k, p, has_k, has_p = asked(row, of_blocks, temperature, top_k, top_p, vocab)
    if has_p if of_p else has_k:
        this = (4 + number if of_p else number) * rows + row
        last = this - rows
        low, high, before, target = _range_of_round(
            histograms + last * _BINS, found + last * 3, totals + row, k, p, has_k, number, of_p, last_shift
        )
        if tl.program_id(1) == 0:
            tl.store(found + this * 3, low.to(tl.int64))
            tl.store(found + this * 3 + 1, before)
            tl.store(found + this * 3 + 2, target)
        worst = high - 1
        if number == 0:
            worst = min(worst, worst_of_p(p, vocab) if of_p else worst_of_k(of_blocks, k, best, heat))
        for step in tl.range(0, tiles):
            token = (tl.program_id(1) * tiles + step) * _TILE + tl.arange(0, _TILE)
            logit = tl.load(logits + row * row_stride + token, mask=token < vocab, other=float("-inf"))
            score = score_of(logit.to(tl.float32), best, heat)
            magnitude = magnitude_of(score)
            inside = (token < vocab) & (magnitude >= low) & (magnitude < high)
            if tl.max(inside.to(tl.int32), axis=0) > 0:  # few tiles have any of a late round
                if of_p:
                    amount = (tl.exp(score.to(tl.float64)) * (1 << mass_bits) + 0.5).to(tl.int64)
                    if number == 0:
                        mass = tl.sum(tl.where(inside, amount, 0), axis=0)
                        tl.atomic_add(totals + row, mass, sem="relaxed")
                else:
                    amount = tl.full((_TILE,), 1, tl.int64)
                if number == 0:
                    bin_id = tl.minimum(-score * _BINS_OF_ONE, _BINS - 1.0).to(tl.int32)
                else:
                    bin_id = (magnitude - low) >> shift
                bin_id = tl.minimum(tl.maximum(bin_id, 0), _BINS - 1)  # of tokens outside, too
                added = inside & (magnitude <= worst)
                tl.atomic_add(histograms + this * _BINS + bin_id, amount, mask=added, sem="relaxed")


@triton.jit(do_not_specialize=["rows"])
def _threshold_kernel(
    largest,
    temperature,
    top_k,
    top_p,
    min_p,
    histograms,
    found,
    thresholds,
    vocab,
    rows,
    num_blocks,
    blocks: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    of_blocks = blocks_of(largest, row, num_blocks, blocks)
    _best, _heat, _k, _p, has_k, has_p = asked(row, of_blocks, temperature, top_k, top_p, vocab)
    threshold = tl.full((), float("-inf"), tl.float32)
    if has_k | has_p:
        last = tl.where(has_p, 7, 3) * rows + row
        before, target = tl.load(found + last * 3 + 1), tl.load(found + last * 3 + 2)
        at, _before = _reaching(histograms + last * _BINS, before, target)
        magnitude = (tl.load(found + last * 3) + at).to(tl.int32)
        threshold = (magnitude | _SIGN).to(tl.float32, bitcast=True)
    least = tl.load(min_p + row)
    if least > 0.0:
        threshold = tl.maximum(threshold, tl.log(least.to(tl.float64)).to(tl.float32))
    tl.store(thresholds + row, threshold)


def mass_bits(vocab: int) -> int:
    """Of the best token's mass, as a power of 2. All may be as good, and int64 holds the sum."""
    return min(_MASS_BITS, 62 - vocab.bit_length())


def thresholds(
    logits: Tensor,
    largest: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    *,
    no_top_k: bool = False,
    no_top_p: bool = False,
) -> Tensor:
    """The least score that passes top_k, then top_p, then min_p, float32 `[R]`; -inf where all do.

    logits `[R, V]`; largest float32 `[R, B]`, contiguous: of the blocks that a row is made of, in any way;
    temperature, top_p and min_p float32 `[R]`, top_k int64 `[R]`. Rows without a temperature, or whose best
    logit is not finite, are not filtered by the first two. Tokens that tie with the last one stay. Takes 128
    KiB a row. `no_top_k`, `no_top_p`: no row uses it, which spares launches.
    """
    rows, vocab = logits.shape
    num_blocks, all_tiles = largest.shape[1], triton.cdiv(vocab, _TILE.value)
    num_bins = 2 * _ROUNDS * rows * _BINS.value
    sums = torch.zeros(num_bins + rows, dtype=torch.int64, device=logits.device)
    histograms, totals = sums[:num_bins], sums[num_bins:]
    found = torch.empty((2 * _ROUNDS, rows, 3), dtype=torch.int64, device=logits.device)
    tiles = triton.cdiv(all_tiles * max(1, rows), _PROGRAMS)
    blocks = triton.next_power_of_2(num_blocks)
    for of_p in [False] * (not no_top_k) + [True] * (not no_top_p):
        for number in range(_ROUNDS):
            _round_kernel[(rows, triton.cdiv(all_tiles, tiles))](
                logits,
                largest,
                temperature,
                top_k,
                top_p,
                histograms,
                totals,
                found,
                logits.stride(0),
                vocab,
                rows,
                num_blocks,
                tiles,
                number=number,
                of_p=of_p,
                shift=_SHIFTS[number],
                last_shift=_SHIFTS[number - 1],
                mass_bits=mass_bits(vocab),
                blocks=blocks,
                num_warps=8,
            )
    out = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _threshold_kernel[(rows,)](
        largest,
        temperature,
        top_k,
        top_p,
        min_p,
        histograms,
        found,
        out,
        vocab,
        rows,
        num_blocks,
        blocks=blocks,
        num_warps=8,
    )
    return out
