"""The only door to the kernels: one function per op.

Every op runs where its tensors are. `reference/` is plain torch, the specification, and the CPU path.
Shapes: T tokens of a step, B sequences, R rows of logits, V vocabulary size, H heads, D head_dim.
On CUDA they agree with the reference in float64 within 1e-4 in float32, 5e-3 in bfloat16 and 1e-3 in float16,
relative to the norm of the result (`tests/support/device_ops.py`); ids, bytes and digests agree exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from phloem.kernels.limits import DECODE_HEAD_DIMS, HOPPER, HOPPER_ACTIVATION
from phloem.kernels.reference import activation as _activation
from phloem.kernels.reference import attention as _attention
from phloem.kernels.reference import linear as _linear
from phloem.kernels.reference import norm as _norm
from phloem.kernels.reference import pages as _pages
from phloem.kernels.reference import rope as _rope
from phloem.kernels.reference import sampling as _sampling
from phloem.kernels.types import (
    Activation,
    AttentionPlan,
    DecodeShape,
    DevicePlan,
    LinearWeight,
    PagedKV,
    StepWeights,
)

if TYPE_CHECKING:
    from phloem.kernels.hopper_ops.chain_plan import ChainPlan
    from phloem.kernels.hopper_ops.chain_step import ChainStep
    from phloem.kernels.hopper_ops.decode_step import LaunchPlan, OneLaunchStep
    from phloem.kernels.triton_ops.decode_kernels import DecodeKernels


class SamplingHints(NamedTuple):
    """What the host knows of a batch's sampling parameters, so that the device need not be asked."""

    all_greedy: bool  # every temperature is 0
    no_filters: bool  # no row with a temperature uses top_k, top_p or min_p
    no_top_k: bool = False
    no_top_p: bool = False


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x**2) + eps) * weight` over the last dimension; statistics in float32.

    x: `[..., N]`, weight: `[N]` of the same dtype. Returns a new tensor like x.
    """
    if x.is_cuda:
        from phloem.kernels import cuda_ops

        return cuda_ops.rms_norm(x, weight, eps)
    return _norm.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Adds x to `residual` **in place**, and returns the norm of the sum (as `rms_norm`).

    x, residual: `[T, N]`, weight: `[N]`, one dtype.
    """
    if x.is_cuda:
        from phloem.kernels import cuda_ops

        return cuda_ops.add_rms_norm(x, residual, weight, eps)
    return _norm.add_rms_norm(x, residual, weight, eps)


def prepare_linear(plain: LinearWeight, *, shared: bool = False) -> LinearWeight:
    """The same weight, laid out as this device multiplies fastest: a copy, or `plain` itself.

    A packed result can only be passed to `linear`. With `shared`, others read the weight too (tied
    embeddings): the result stays an ordinary `[out, in]` tensor, maybe with other strides. Call it once per
    weight, at load, and drop the original.
    """
    return _linear.prepare_linear(plain, shared=shared)


def linear(x: Tensor, w: LinearWeight) -> Tensor:
    """`x @ w.weight.T + w.bias`. x: `[T, in]`, of the weight's dtype. Returns `[T, out]`, any strides."""
    return _linear.linear(x, w)


def act_mul(gate_up: Tensor, activation: Activation) -> Tensor:
    """`activation(gate) * up` of the fused projection `[T, 2 * N]` (gate first). Returns `[T, N]`."""
    if gate_up.is_cuda:
        from phloem.kernels import cuda_ops

        return cuda_ops.act_mul(gate_up, activation)
    return _activation.act_mul(gate_up, activation)


def rope_write_kv(
    qk: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_pages: Tensor, v_pages: Tensor, write_index: Tensor
) -> Tensor:
    """Rotates q and k (neox: halves of a head), and writes k and v into their pages.

    qk: `[T, H + H_kv, D]`, the query heads first; v: `[T, H_kv, D]`. cos, sin: `[T, 1, D]` in the dtype of
    qk, the tables' rows of this step's positions; the first half of `sin` is negated, so that
    `rotated = x * cos + swap_halves(x) * sin`. k_pages, v_pages: `[num_pages, page_size, H_kv, D]`.
    write_index: int64 `[T]`, `page_id * page_size + offset`, no index twice.
    Returns the rotated q, `[T, H, D]`.
    """
    if qk.is_cuda:
        from phloem.kernels import cuda_ops

        return cuda_ops.rope_write_kv(qk, v, cos, sin, k_pages, v_pages, write_index)
    return _rope.rope_write_kv(qk, v, cos, sin, k_pages, v_pages, write_index)


def plan_attention(
    query_lens: Sequence[int], kv_lens: Sequence[int], page_table: Tensor, page_size: int, window: int = 0
) -> AttentionPlan:
    """What `paged_attention` needs to know about a step, made once and used by every layer.

    query_lens, kv_lens: B entries, `1 <= query_len <= kv_len`; the queries are the last tokens of their
    sequence. page_table: int64 `[B, max_pages]`, pages of each sequence in order. window: 0, or the number
    of tokens (itself included) that a token sees.
    """
    return _attention.plan_attention(query_lens, kv_lens, page_table, page_size, window)


def paged_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: AttentionPlan | DevicePlan, scale: float
) -> Tensor:
    """Causal attention of a ragged batch over its pages; K and V of this step are in the pages already.

    q: `[T, H, D]`, k_pages, v_pages: `[num_pages, page_size, H_kv, D]`, H a multiple of H_kv (query head h
    reads KV head `h // (H / H_kv)`). `plan` is `plan_attention`'s, or one of a device backend. Logits are
    scaled by `scale`. Returns `[T, H, D]`, contiguous.
    """
    if not isinstance(plan, AttentionPlan):
        return plan.attend(q, k_pages, v_pages, scale)
    return _attention.paged_attention(q, k_pages, v_pages, plan, scale)


def gather_pages(kv: PagedKV, page_ids: Tensor, layer_start: int, layer_end: int, out: Tensor) -> int:
    """Copies pages into staging and returns the digest of the bytes.

    page_ids: int64 `[P]`. out: flat uint8, at least `(layer_end - layer_start) * P * page_bytes` long
    (page_bytes: K and V of one page in one layer), written as `[layer, k/v, page, token, head, dim]` from its
    start; the rest is left alone. The digest is a signed 64-bit integer; zero bytes give 0.
    """
    if out.is_cuda:
        from phloem.kernels import cuda_ops

        return int(cuda_ops.gather_pages(kv, page_ids, layer_start, layer_end, out))
    return _pages.gather_pages(kv, page_ids, layer_start, layer_end, out)


def scatter_pages(kv: PagedKV, page_ids: Tensor, layer_start: int, layer_end: int, src: Tensor) -> int:
    """Copies staging bytes, laid out as `gather_pages` writes them, into pages; returns their digest.

    page_ids must name each page once. The caller compares the digest with the sender's before it lets
    anyone read the pages.
    """
    if src.is_cuda:
        from phloem.kernels import cuda_ops

        return int(cuda_ops.scatter_pages(kv, page_ids, layer_start, layer_end, src))
    return _pages.scatter_pages(kv, page_ids, layer_start, layer_end, src)


def plane_addresses(kv: PagedKV) -> Tensor:
    """Where K, then V of each layer lie: int64 `[2 * layers]` on their device."""
    planes = [plane for layer in zip(kv.k, kv.v, strict=True) for plane in layer]
    return torch.tensor([plane.data_ptr() for plane in planes], dtype=torch.int64, device=planes[0].device)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    position: Tensor,
    hints: SamplingHints | None = None,
) -> Tensor:
    """One token per row: int64 `[R]`.

    logits: float32 `[R, V]`, left as it is; -inf forbids a token. Per row: temperature float32 (0: greedy,
    the first of the largest logits), top_k int64 (0 or less: off; ties with the k-th stay), top_p float32
    (1 or more: off; 0 or less keeps the best token), min_p float32 (0: off; relative to the best token), in
    that order, as Hugging Face applies them. seed, position: int64, any values; position is that of the token
    being sampled. Equal (row, seed, position) give equal tokens, whatever the other rows are. A row whose
    logits are all -inf gives token 0. `hints` spare a CUDA device from being waited for; there, of tokens
    that tie with the last one of a nucleus, all stay.
    """
    if logits.is_cuda:
        known = hints or SamplingHints(all_greedy=False, no_filters=False)
        from phloem.kernels import cuda_ops

        return cuda_ops.sample(
            logits,
            temperature,
            top_k,
            top_p,
            min_p,
            seed,
            position,
            **known._asdict(),
        )
    return _sampling.sample(logits, temperature, top_k, top_p, min_p, seed, position)


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
    """The tokens of `sample` without filters, put where they are wanted: `last_token[slot[r]]` and
    `results[turn[0], r]`.

    slot int64 `[R]`; last_token int64 `[num_slots]`; results int64 `[turns, R or more]`, for CUDA in pinned
    host memory or on the device; turn int32 `[1 or more]`. Of rows that share a slot, any may be the one that
    stays in `last_token`. On CUDA nothing is waited for and no launch depends on values: it may be captured.
    `all_greedy` spares a launch.
    """
    drawn = (logits, temperature, seed, position, slot, last_token, results, turn)
    if logits.is_cuda:
        from phloem.kernels import cuda_ops

        cuda_ops.sample_to_slots(*drawn, all_greedy=all_greedy)
    else:
        _sampling.sample_to_slots(*drawn)


def place_pages(table: Tensor, count: Tensor, pairs: Tensor) -> None:
    """`table.view(-1)[pairs[i, 0]] = pairs[i, 1]` for i below `count[0]`.

    table int32 `[num_slots, max_pages]`, contiguous; count int32 `[1 or more]`; pairs int32 `[P, 2]`, P at
    least the count; equal places bring equal pages. On CUDA nothing is waited for: it may be captured.
    """
    if table.is_cuda:
        from phloem.kernels import cuda_ops

        cuda_ops.place_pages(table, count, pairs)
    else:
        _pages.place_pages(table, count, pairs)


def apply_bitmask(logits: Tensor, bitmask: Tensor, rows: Tensor) -> None:
    """Sets the logits of forbidden tokens to -inf, in place.

    logits float32 `[R, V]`; bitmask int32 `[N, ceil(V / 32)]`: bit t % 32 of word t // 32 allows token t;
    rows int64 `[N]`, no row twice: which row of logits each mask is for.
    """
    if logits.is_cuda:
        from phloem.kernels import cuda_ops

        cuda_ops.apply_bitmask(logits, bitmask, rows)
    else:
        _sampling.apply_bitmask(logits, bitmask, rows)


def decode_kernels(
    shape: DecodeShape, dtype: torch.dtype, device: torch.device, max_rows: int
) -> DecodeKernels | None:
    """The kernels that make a whole decode step of up to `max_rows` sequences, or None where they can't run.

    They compute what `Decoder.forward` does for one token per sequence, with fewer roundings in between.
    """
    halves = dtype in (torch.bfloat16, torch.float16)
    if device.type != "cuda" or not halves or shape.head_dim not in DECODE_HEAD_DIMS:
        return None
    from phloem.kernels.triton_ops.decode_kernels import DecodeKernels

    return DecodeKernels(shape, device, max_rows)


def plan_decode_step(shape: DecodeShape, dtype: torch.dtype, device: torch.device) -> LaunchPlan | None:
    """How a whole decode step of few rows would be one launch; None where it can't be (`decode_step`)."""
    if not _is_for_hopper(shape, dtype, device):
        return None
    from phloem.kernels.hopper_ops.decode_step import plan_step

    return plan_step(shape, torch.cuda.get_device_properties(device).multi_processor_count)


def plan_chain_step(
    shape: DecodeShape, dtype: torch.dtype, device: torch.device
) -> dict[int, ChainPlan] | None:
    """How the products between two attentions would be one launch, by rows; None where they can't be. Raises
    CudaError where the compiler or the driver fails."""
    if not _is_for_hopper(shape, dtype, device) or shape.head_dim not in DECODE_HEAD_DIMS:
        return None
    from phloem.kernels.hopper_ops.chain_plan import CLUSTERS, SHARED_BYTES, SIZES, plan_chain
    from phloem.kernels.hopper_ops.program import resident_blocks

    blocks = resident_blocks(device, CLUSTERS, SHARED_BYTES)
    plans = {size: plan_chain(shape, size, blocks) for size in SIZES}
    return {size: plan for size, plan in plans.items() if plan is not None} or None


def _is_for_hopper(shape: DecodeShape, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels in CUDA C++ can be made."""
    halves = dtype in (torch.bfloat16, torch.float16)
    if device.type != "cuda" or not halves or shape.activation != HOPPER_ACTIVATION:
        return False
    from phloem.kernels.hopper_ops.program import has_bindings

    return torch.cuda.get_device_capability(device) == HOPPER and has_bindings()


def decode_step(shape: DecodeShape, weights: StepWeights, kv: PagedKV, plan: LaunchPlan) -> OneLaunchStep:
    """The kernel of whole decode steps, compiled; `plan` is `plan_decode_step`'s. Raises CudaError where it
    can't be made or run."""
    from phloem.kernels.hopper_ops.decode_step import OneLaunchStep

    return OneLaunchStep(shape, weights, kv, plan)


def chain_step(
    shape: DecodeShape,
    weights: StepWeights,
    kv: PagedKV,
    plans: dict[int, ChainPlan],
    kernels: DecodeKernels,
) -> ChainStep:
    """A whole decode step of a launch of attention (`kernels`' for models that page_attention.cu does not
    take) and one of products for each layer, compiled; `plans` are `plan_chain_step`'s. Raises CudaError
    where it can't be made or run."""
    from phloem.kernels.hopper_ops.chain_step import ChainStep

    return ChainStep(shape, weights, kv, plans, kernels)
