"""Gumbel-max sampling by counter, and the grammar bitmask, over the whole vocabulary of a batch.

Each program looks at one block of one row and keeps its best token; a second, small launch takes the best
of the blocks. The noise is that of `reference/sampling.py`: splitmix64 of (seed, position, vocabulary
index), in float64, so that the CPU and every GPU sample the same tokens from the same logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from phloem.kernels.reference.sampling import GOLDEN, MIX_1, MIX_2

_BLOCK = 2048


@triton.jit
def _splitmix64(x, golden: tl.constexpr, mix_1: tl.constexpr, mix_2: tl.constexpr):
    z = (x + golden).to(tl.uint64, bitcast=True)
    z = (z ^ (z >> 30)) * tl.full((), mix_1, tl.int64).to(tl.uint64, bitcast=True)
    z = (z ^ (z >> 27)) * tl.full((), mix_2, tl.int64).to(tl.uint64, bitcast=True)
    return z ^ (z >> 31)


@triton.jit
def _best_of_block_kernel(
    logits,
    best_logit,
    temperature,
    threshold,
    seed,
    position,
    block_score,
    block_token,
    row_stride,
    vocab,
    num_blocks,
    golden: tl.constexpr,
    mix_1: tl.constexpr,
    mix_2: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * block + tl.arange(0, block)
    inside = token < vocab
    logit = tl.load(logits + row * row_stride + token, mask=inside, other=float("-inf")).to(tl.float32)
    heat = tl.load(temperature + row)
    best = tl.load(best_logit + row)
    if (heat > 0.0) & (best > float("-inf")) & (best < float("inf")):
        score = (logit - best) / heat
        keep = inside & (score >= tl.load(threshold + row))
        key = _splitmix64(tl.load(seed + row), golden, mix_1, mix_2).to(tl.int64, bitcast=True)
        key = _splitmix64(key + tl.load(position + row), golden, mix_1, mix_2).to(tl.int64, bitcast=True)
        bits = _splitmix64(key + token.to(tl.int64) * golden, golden, mix_1, mix_2) >> 12
        uniform = (bits.to(tl.int64).to(tl.float64) + 0.5) * 2.220446049250313e-16
        noisy = score.to(tl.float64) - tl.log(-tl.log(uniform))
    else:
        keep = inside
        noisy = logit.to(tl.float64)
    noisy = tl.where(keep, noisy, float("-inf"))
    value, index = tl.max(noisy, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(block_score + row * num_blocks + tl.program_id(1), value)
    tl.store(block_token + row * num_blocks + tl.program_id(1), tl.program_id(1) * block + index)


@triton.jit
def _best_of_row_kernel(block_score, block_token, out, num_blocks, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < num_blocks
    score = tl.load(block_score + row * num_blocks + column, mask=inside, other=float("-inf"))
    _, index = tl.max(score, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(out + row, tl.load(block_token + row * num_blocks + index))


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
) -> Tensor:
    """See `ops.sample`. Never waits for the device: the caller says what the host knows of the batch.

    Where several tokens tie with the last one of a nucleus, all of them stay (the reference keeps the first).
    """
    if all_greedy:
        return gumbel_argmax(logits, temperature, temperature, temperature, seed, position)
    best = logits.max(dim=-1).values.float()
    if no_filters:
        threshold = torch.full_like(temperature, float("-inf"))
    else:
        threshold = _thresholds(logits, best, temperature, top_k, top_p, min_p)
    return gumbel_argmax(logits, best, temperature, threshold, seed, position)


def _thresholds(
    logits: Tensor, best: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """The least score `(logit - best) / temperature` that passes top_k, then top_p, then min_p."""
    vocab = logits.shape[1]
    heat = torch.where(temperature > 0, temperature, 1.0).unsqueeze(1)
    ranked = ((logits.float() - best.unsqueeze(1)) / heat).sort(dim=-1, descending=True).values
    limit = torch.where((top_k > 0) & (top_k < vocab), top_k, vocab).unsqueeze(1)
    by_k = ranked.gather(1, limit - 1)
    masses = torch.where(ranked >= by_k, ranked.double(), float("-inf")).exp_()
    before = masses.cumsum(dim=-1) / masses.sum(dim=-1, keepdim=True)
    num_kept = (before < top_p.double().unsqueeze(1)).sum(dim=-1, keepdim=True) + 1
    by_p = ranked.gather(1, num_kept.clamp(max=vocab) - 1)
    by_p = torch.where(top_p.unsqueeze(1) < 1.0, by_p, float("-inf"))
    by_min = torch.where(min_p > 0, min_p.log(), float("-inf")).unsqueeze(1)
    return torch.maximum(torch.maximum(by_k, by_p), by_min).squeeze(1)


def gumbel_argmax(
    logits: Tensor,
    best_logit: Tensor,
    temperature: Tensor,
    threshold: Tensor,
    seed: Tensor,
    position: Tensor,
) -> Tensor:
    """The best token of each row: int64 `[R]`.

    logits `[R, V]`, float32 or narrower; best_logit float32 `[R]`, each row's largest; threshold float32
    `[R]`: tokens whose `(logit - best) / temperature` is below it are not sampled (-inf: all are). Rows of
    temperature 0 take the first of the largest logits.
    """
    num_rows, vocab = logits.shape
    num_blocks = triton.cdiv(vocab, _BLOCK)
    device = logits.device
    scores = torch.empty((num_rows, num_blocks), dtype=torch.float64, device=device)
    tokens = torch.empty((num_rows, num_blocks), dtype=torch.int64, device=device)
    out = torch.empty(num_rows, dtype=torch.int64, device=device)
    _best_of_block_kernel[(num_rows, num_blocks)](
        logits,
        best_logit,
        temperature,
        threshold,
        seed,
        position,
        scores,
        tokens,
        logits.stride(0),
        vocab,
        num_blocks,
        golden=GOLDEN,
        mix_1=MIX_1,
        mix_2=MIX_2,
        block=_BLOCK,
        num_warps=8,
    )
    _best_of_row_kernel[(num_rows,)](
        scores, tokens, out, num_blocks, block=triton.next_power_of_2(num_blocks), num_warps=1
    )
    return out


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
