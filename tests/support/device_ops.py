"""Random inputs for attention kernels, and the reference's answer: for the interpreter and for CUDA."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from phloem.kernels.reference import attention as reference_attention
from phloem.kernels.types import AttentionPlan


class Heads(NamedTuple):
    num_heads: int
    num_kv_heads: int
    head_dim: int


# GQA 1, 4 and 8 with each head_dim that has kernels of its own, and SmolLM2's 9 heads on 3.
HEADS = (
    *(Heads(2, 2, head_dim) for head_dim in (64, 128, 256)),
    *(Heads(8, 2, head_dim) for head_dim in (64, 128, 256)),
    *(Heads(8, 1, head_dim) for head_dim in (64, 128, 256)),
    Heads(9, 3, 64),
)

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-3, torch.float16: 1e-3}


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """The bound of `relative_error` of a kernel, beside the reference in float64 from the same inputs.

    Triton's interpreter has numpy's functions in float32, and cuts bfloat16 where a device rounds it.
    """
    if device.type == "cpu" and dtype == torch.float32:
        return 1e-5
    return _TOLERANCE[dtype] * (2 if device.type == "cpu" and dtype == torch.bfloat16 else 1)


class PagedBatch(NamedTuple):
    """Sequences of different lengths, at different places, over shuffled pages."""

    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    query_lens: np.ndarray
    kv_lens: np.ndarray
    page_table: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> PagedBatch:
        q, k, v = (tensor.to(device=device, dtype=dtype) for tensor in (self.q, self.k_pages, self.v_pages))
        return self._replace(q=q, k_pages=k, v_pages=v)

    def plan(self, window: int) -> AttentionPlan:
        return reference_attention.plan_attention(
            self.query_lens.tolist(), self.kv_lens.tolist(), self.page_table, self.k_pages.shape[1], window
        )

    def expected(self, window: int = 0) -> Tensor:
        """The reference in float64."""
        q, k, v = (tensor.double().cpu() for tensor in (self.q, self.k_pages, self.v_pages))
        return reference_attention.paged_attention(q, k, v, self.plan(window), self.q.shape[2] ** -0.5)


def paged_batch(
    heads: Heads, page_size: int, *, query_lens: tuple[int, ...], kv_lens: tuple[int, ...], seed: int = 0
) -> PagedBatch:
    generator = torch.Generator().manual_seed(seed)
    max_pages = max(-(-n // page_size) for n in kv_lens)
    num_pages = len(kv_lens) * max_pages + 1
    table = torch.randperm(num_pages, generator=generator)[: len(kv_lens) * max_pages]
    pages = (num_pages, page_size, heads.num_kv_heads, heads.head_dim)
    return PagedBatch(
        torch.randn(sum(query_lens), heads.num_heads, heads.head_dim, generator=generator),
        torch.randn(pages, generator=generator),
        torch.randn(pages, generator=generator),
        np.array(query_lens),
        np.array(kv_lens),
        table.view(len(kv_lens), max_pages),
    )


def relative_error(out: Tensor, expected: Tensor) -> float:
    """||out - expected|| / ||expected||; NaN never passes a bound."""
    difference = (out.double().cpu() - expected.double().cpu()).norm()
    return float(difference / expected.double().cpu().norm())
