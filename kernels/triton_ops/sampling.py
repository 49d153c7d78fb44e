"""Gumbel-max sampling by counter, and the grammar bitmask, over the whole vocabulary of a batch.

Each program looks at one block of one row and keeps its largest logit; rows with a temperature are looked at
once more, with noise; a small launch takes the best of the blocks. The noise is that of
`reference/sampling.py`: splitmix64 of (seed, position, vocabulary index), in float64, so that the CPU and
every GPU sample the same tokens from the same logits. No launch depends on what the rows want, so that they
may be part of a CUDA graph.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from phloem.kernels.reference.sampling import GOLDEN, MIX_1, MIX_2
from phloem.kernels.triton_ops.row_scores import blocks_of, is_finite, score_of
from phloem.kernels.triton_ops.thresholds import thresholds

_BLOCK = 2048


@triton.jit
def _splitmix64(x, golden: tl.constexpr, mix_1: tl.constexpr, mix_2: tl.constexpr):
    z = (x + golden).to(tl.uint64, bitcast=True)
    z = (z ^ (z >> 30)) * tl.full((), mix_1, tl.int64).to(tl.uint64, bitcast=True)
    z = (z ^ (z >> 27)) * tl.full((), mix_2, tl.int64).to(tl.uint64, bitcast=True)
    return z ^ (z >> 31)


@triton.jit
def _largest_of_block_kernel(
    logits, block_logit, block_token, row_stride, vocab, num_blocks, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * block + tl.arange(0, block)
    logit = tl.load(logits + row * row_stride + token, mask=token < vocab, other=float("-inf"))
    value, index = tl.max(
        logit.to(tl.float32), axis=0, return_indices=True, return_indices_tie_break_left=True
    )
    tl.store(block_logit + row * num_blocks + tl.program_id(1), value)
    tl.store(block_token + row * num_blocks + tl.program_id(1), tl.program_id(1) * block + index)


@triton.jit
def _noisy_best_of_block_kernel(
    logits,
    block_logit,
    temperature,
    threshold,
    seed,
    position,
    noisy_score,
    noisy_token,
    row_stride,
    vocab,
    num_blocks,
    golden: tl.constexpr,
    mix_1: tl.constexpr,
    mix_2: tl.constexpr,
    block: tl.constexpr,
    blocks: tl.constexpr,
    has_threshold: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    heat = tl.load(temperature + row)
    if heat > 0.0:
        best = tl.max(blocks_of(block_logit, row, num_blocks, blocks), axis=0)
        if is_finite(best):
            token = tl.program_id(1) * block + tl.arange(0, block)
            keep = token < vocab
            logit = tl.load(logits + row * row_stride + token, mask=keep, other=float("-inf")).to(tl.float32)
            score = score_of(logit, best, heat)
            if has_threshold:
                keep = keep & (score >= tl.load(threshold + row))
            key = _splitmix64(tl.load(seed + row), golden, mix_1, mix_2).to(tl.int64, bitcast=True)
            key = _splitmix64(key + tl.load(position + row), golden, mix_1, mix_2).to(tl.int64, bitcast=True)
            bits = _splitmix64(key + token.to(tl.int64) * golden, golden, mix_1, mix_2) >> 12
            uniform = (bits.to(tl.int64).to(tl.float64) + 0.5) * 2.220446049250313e-16
            noisy = score.to(tl.float64) - tl.log(-tl.log(uniform))
            noisy = tl.where(keep, noisy, float("-inf"))
            value, index = tl.max(noisy, axis=0, return_indices=True, return_indices_tie_break_left=True)
            tl.store(noisy_score + row * num_blocks + tl.program_id(1), value)
            tl.store(noisy_token + row * num_blocks + tl.program_id(1), tl.program_id(1) * block + index)


@triton.jit
def _choose_kernel(
    block_logit,
    block_token,
    temperature,
    noisy_score,
    noisy_token,
    slot,
    last_token,
    results,
    turn,
    num_blocks,
    vocab,
    results_stride,
    blocks: tl.constexpr,
    all_greedy: tl.constexpr,
    to_slots: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    largest = blocks_of(block_logit, row, num_blocks, blocks)
    best, index = tl.max(largest, axis=0, return_indices=True, return_indices_tie_break_left=True)
    token = tl.load(block_token + row * num_blocks + index)
    if not all_greedy:  # noqa: SIM102  # known when it is compiled; the other is not
        if (tl.load(temperature + row) > 0.0) & is_finite(best):
            score = blocks_of(noisy_score, row, num_blocks, blocks)
            _, index = tl.max(score, axis=0, return_indices=True, return_indices_tie_break_left=True)
            token = tl.load(noisy_token + row * num_blocks + index)
    token = tl.minimum(token, vocab - 1).to(tl.int64)  # of logits that are no numbers, too, an id comes out
    if to_slots:
        tl.store(last_token + tl.load(slot + row), token)
        tl.store(results + tl.load(turn).to(tl.int64) * results_stride + row, token)
    else:
        tl.store(results + row, token)


@triton.jit
def _bitmask_kernel(logits, bitmask, rows, row_stride, mask_stride, vocab, block: tl.constexpr):
    entry = tl.program_id(0)
    row = tl.load(rows + entry).to(tl.int64)
    token = tl.program_id(1) * block + tl.arange(0, block)
    inside = token < vocab
    word = tl.load(bitmask + entry.to(tl.int64) * mask_stride + token // 32, mask=inside, other=-1)
    forbidden = inside & (((word >> (token % 32)) & 1) == 0)
    tl.store(logits + row * row_stride + token, float("-inf"), mask=forbidden)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    *,
    all_greedy: bool,
    no_filters: bool,
    no_top_k: bool = False,
    no_top_p: bool = False,
) -> Tensor:
    """See `ops.sample`. Never waits for the device: the caller says what the host knows of the batch.

    Where several tokens tie with the last one of a nucleus, all of them stay (the reference keeps the first).
    """
    draw = _Draw(logits, temperature)
    if not all_greedy:
        threshold = None
        if not no_filters:
            filters = (temperature, top_k, top_p, min_p)
            threshold = thresholds(logits, draw.largest, *filters, no_top_k=no_top_k, no_top_p=no_top_p)
        draw.add_noise(seed, position, threshold)
    out = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    draw.choose(out, all_greedy=all_greedy)
    return out


def sample_to_slots(
    logits: Tensor,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    slot: Tensor,
    last_token: Tensor,
    results: Tensor,
    turn: Tensor,
    *,
    all_greedy: bool = False,
) -> None:
    """See `ops.sample_to_slots`."""
    draw = _Draw(logits, temperature)
    if not all_greedy:
        draw.add_noise(seed, position, None)
    draw.choose(results, all_greedy=all_greedy, slots=_Slots(slot, last_token, turn))


class _Slots(NamedTuple):
    """Where the tokens go, besides the results: see `ops.sample_to_slots`."""

    slot: Tensor
    last_token: Tensor
    turn: Tensor


class _Draw:
    """One batch on its way to its tokens. logits `[R, V]`, float32 or narrower; temperature float32 `[R]`."""

    def __init__(self, logits: Tensor, temperature: Tensor) -> None:
        self._logits = logits
        self._temperature = temperature
        num_rows, vocab = logits.shape
        self._grid = (num_rows, triton.cdiv(vocab, _BLOCK))
        self.largest = torch.empty(self._grid, dtype=torch.float32, device=logits.device)
        self._tokens = torch.empty(self._grid, dtype=torch.int64, device=logits.device)
        self._scores, self._noisy = self.largest, self._tokens
        _largest_of_block_kernel[self._grid](
            logits,
            self.largest,
            self._tokens,
            logits.stride(0),
            vocab,
            self._grid[1],
            block=_BLOCK,
            num_warps=8,
        )

    def add_noise(self, seed: Tensor, position: Tensor, threshold: Tensor | None) -> None:
        """For rows with a temperature. threshold float32 `[R]`: tokens whose `(logit - best) / temperature`
        is below it are not sampled (None: all are)."""
        self._scores = torch.empty(self._grid, dtype=torch.float64, device=seed.device)
        self._noisy = torch.empty_like(self._tokens)
        _noisy_best_of_block_kernel[self._grid](
            self._logits,
            self.largest,
            self._temperature,
            self.largest if threshold is None else threshold,
            seed,
            position,
            self._scores,
            self._noisy,
            self._logits.stride(0),
            self._logits.shape[1],
            self._grid[1],
            golden=GOLDEN,
            mix_1=MIX_1,
            mix_2=MIX_2,
            block=_BLOCK,
            blocks=triton.next_power_of_2(self._grid[1]),
            has_threshold=threshold is not None,
            num_warps=8,
        )

    def choose(self, results: Tensor, *, all_greedy: bool, slots: _Slots | None = None) -> None:
        """Writes each row's token. With `all_greedy` no noise was added."""
        slot, last_token, turn = slots or (results, results, results)
        _choose_kernel[(self._grid[0],)](
            self.largest,
            self._tokens,
            self._temperature,
            self._scores,
            self._noisy,
            slot,
            last_token,
            results,
            turn,
            self._grid[1],
            self._logits.shape[1],
            results.stride(0),
            blocks=triton.next_power_of_2(self._grid[1]),
            all_greedy=all_greedy,
            to_slots=slots is not None,
            num_warps=1,
        )


def apply_bitmask(logits: Tensor, bitmask: Tensor, rows: Tensor) -> None:
    """Sets the logits of tokens whose bit is 0 to -inf, in place.

    logits float32 `[R, V]`; bitmask int32 `[N, ceil(V / 32)]`, bit t % 32 of word t // 32 allows token t;
    rows int64 `[N]`: which row of logits each mask is for.
    """
    if not rows.numel():
        return
    vocab = logits.shape[1]
    grid = (rows.numel(), triton.cdiv(vocab, _BLOCK))
    _bitmask_kernel[grid](
        logits, bitmask, rows, logits.stride(0), bitmask.stride(0), vocab, block=_BLOCK, num_warps=4
    )
