"""A decode step of up to 64 rows on Hopper: a launch of attention and one of products for each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from phloem.kernels.hopper_ops.chain_plan import TEAMS, ChainPlan
from phloem.kernels.hopper_ops.page_attention import PageAttention
from phloem.kernels.hopper_ops.page_plan import plan_pages
from phloem.kernels.hopper_ops.product_chain import MAX_ROWS, ChainLink, ProductChain
from phloem.kernels.triton_ops.decode_begin import begin_rows
from phloem.kernels.triton_ops.key_shares import MANY
from phloem.kernels.types import (
    DecodeRows,
    DecodeShape,
    LinearWeight,
    PagedKV,
    StepLayer,
    StepWeights,
    norms_of,
)

if TYPE_CHECKING:
    from phloem.kernels.triton_ops.decode_kernels import DecodeKernels


class ChainStep:
    """The step of one model over one KV cache. A captured graph keeps its buffers: it must outlive it.

    All blocks of a launch wait for each other. Where something else may hold a multiprocessor for long, as a
    KV transfer with a peer that hangs, it is the wrong kernel.
    """

    sharing = MANY

    def __init__(
        self,
        shape: DecodeShape,
        weights: StepWeights,
        kv: PagedKV,
        plans: Mapping[int, ChainPlan],
        attention: DecodeKernels,
        *,
        trace: bool = False,
    ) -> None:
        """plans by size; `attention` has room for MAX_ROWS, and is for models that page_attention.cu does not
        take. Raises CudaError where kernels can't be made."""
        device, dtype = weights.embedding.device, weights.embedding.dtype
        self._weights, self._kv, self._attention = weights, kv, attention
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        self.pages: PageAttention | None = None
        if (page_plan := plan_pages(shape, kv.k[0].shape[1], multiprocessors)) is not None:
            has_norms = norms_of(weights.layers[0]) is not None
            self.pages = PageAttention(shape, kv, page_plan, has_norms=has_norms, trace=trace)
        self.chain = ProductChain(plans, len(weights.layers) + 1, dtype, device, trace=trace)
        queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim

        def empty(width: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros((MAX_ROWS, width), dtype=dtype, device=device)

        self._residual, self._scaled = empty(shape.hidden_size), empty(shape.hidden_size)
        self._qkv, self._attended = empty(queries + 2 * keys), empty(queries)
        self._gated = empty(shape.intermediate_size)
        self._logits = empty(shape.vocab_size, torch.float32)
        items = max(plan.tiles[name].items for plan in plans.values() for name in ("o", "down"))
        self._squares = torch.zeros((items * TEAMS, MAX_ROWS), dtype=torch.float32, device=device)

    def takes(self, num_rows: int) -> bool:
        return num_rows <= MAX_ROWS

    def __call__(self, rows: DecodeRows) -> Tensor:
        """Writes the rows' K and V into their pages. Returns float32 logits `[B, vocab]`, there until the
        next step."""
        weights, count, eps = self._weights, len(rows.token), self._weights.eps
        qkv = self._qkv[:count]
        begin_rows(
            rows.token,
            rows.slot,
            rows.last_token,
            weights.embedding,
            weights.layers[0].input_norm,
            self._residual,
            self._scaled,
            self._squares,
        )
        self.chain(0, [self._normed("qkv", count, weights.layers[0].qkv, qkv, 1)], eps)
        for index, layer in enumerate(weights.layers):
            attended = self._attend(index, layer, qkv, rows)
            self.chain(index + 1, self._layer(index, layer, attended), eps)
        return self._logits[:count]

    def _attend(self, index: int, layer: StepLayer, qkv: Tensor, rows: DecodeRows) -> Tensor:
        norms, eps = norms_of(layer), self._weights.eps
        if self.pages is None:
            return self._attention.attend(qkv, rows, self._kv.k[index], self._kv.v[index], norms, eps)
        out = self._attended[: len(qkv)]
        self.pages(index, qkv, rows, norms, eps, out)
        return out

    def _layer(self, index: int, layer: StepLayer, attended: Tensor) -> list[ChainLink]:
        """What comes between this layer's attention and the next one's."""
        weights, count = self._weights, len(attended)
        after_o, after_down = (self.chain.num_squares(name, count) for name in ("o", "down"))
        gated = self._gated[:count]
        gate_up = self._normed("gate_up", count, layer.gate_up, gated, after_o)
        if index + 1 < len(weights.layers):
            following = weights.layers[index + 1]
            gain = following.input_norm
            last = self._normed("qkv", count, following.qkv, self._qkv[:count], after_down)
        else:
            gain = weights.final_norm
            last = self._normed("vocabulary", count, weights.lm_head, self._logits[:count], after_down)
        return [
            self._adds("o", attended, layer.o, layer.post_norm),
            gate_up,
            self._adds("down", gated, layer.down, gain),
            last,
        ]

    def _normed(self, name: str, count: int, w: LinearWeight, out: Tensor, num_squares: int) -> ChainLink:
        return ChainLink(name, self._scaled[:count], w, out, squares=self._squares, num_squares=num_squares)

    def _adds(self, name: str, x: Tensor, w: LinearWeight, gain: Tensor) -> ChainLink:
        count = len(x)
        return ChainLink(
            name,
            x,
            w,
            self._scaled[:count],
            residual=self._residual[:count],
            gain=gain,
            squares_out=self._squares,
        )
