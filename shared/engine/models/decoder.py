"""The decoder: one implementation for every architecture in the registry, driven by flags."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from phloem.kernels import ops
from phloem.kernels.types import AttentionPlan, DevicePlan
from phloem.shared.engine.models.batch import ForwardBatch
from phloem.shared.engine.models.kv_cache import KVCache
from phloem.shared.engine.models.parameters import DecoderParameters, LayerParameters
from phloem.shared.engine.models.registry import find_activation
from phloem.shared.engine.models.rope import RotaryEmbedding
from phloem.shared.model_store.model_config import ModelConfig


class _Step(NamedTuple):
    """What all layers of one step share."""

    cos: Tensor
    sin: Tensor
    write_index: Tensor
    plans: Mapping[int, AttentionPlan | DevicePlan]  # by window


# One layer's attention: its index, its parameters, the projection's output `[T, (H + 2 * H_kv) * D]`;
# returns `[T, H * D]`.
Attend: TypeAlias = Callable[[int, LayerParameters, Tensor], Tensor]


class Decoder:
    """A decoder-only transformer over paged K and V. Holds weights, no state of any request."""

    def __init__(self, config: ModelConfig, parameters: DecoderParameters) -> None:
        self.config = config
        self.parameters = parameters
        self.rope = RotaryEmbedding(config.rope, config.head_dim, parameters.embedding.device)
        self._activation = find_activation(config)
        self._scale = config.head_dim**-0.5
        self._windows = sorted(set(config.layer_windows))

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, activations and KV pages."""
        return self.parameters.embedding.dtype

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, kv: KVCache) -> Tensor:
        """Computes a step and writes its K and V into their pages. Returns float32 logits, `[L, vocab]`.

        Sequences may be at different places: chunks of prompts and single decode tokens mix freely.
        """
        step = self._step(batch, kv)

        def attend(index: int, layer: LayerParameters, qkv: Tensor) -> Tensor:
            plan = step.plans[self.config.layer_windows[index]]
            attended = self._attention(qkv, layer, step, plan, kv.k[index], kv.v[index])
            if batch.on_kv is not None:
                batch.on_kv(index + 1)
            return attended

        x, residual = self._layers(batch.input_ids, attend)
        return self._logits(x, residual, batch.logits_index)

    @torch.inference_mode()
    def decode(self, input_ids: Tensor, attend: Attend) -> Tensor:
        """Float32 logits of one new token per sequence, `[B, vocab]`; `attend` rotates and writes K and V."""
        x, residual = self._layers(input_ids, attend)
        return self._logits(x, residual, None)

    def _layers(self, input_ids: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        """What the last layer adds, and the residual stream that it is still to be added to."""
        parameters, eps, activation = self.parameters, self.config.norm_eps, self._activation
        residual = parameters.embedding[input_ids]
        x = ops.rms_norm(residual, parameters.layers[0].input_norm, eps)
        last = len(parameters.layers) - 1
        for index, layer in enumerate(parameters.layers):
            x = ops.linear(attend(index, layer, ops.linear(x, layer.qkv)), layer.o)
            x = ops.add_rms_norm(x, residual, layer.post_norm, eps)
            x = ops.linear(ops.act_mul(ops.linear(x, layer.gate_up), activation), layer.down)
            if index < last:
                x = ops.add_rms_norm(x, residual, parameters.layers[index + 1].input_norm, eps)
        return x, residual

    def _step(self, batch: ForwardBatch, kv: KVCache) -> _Step:
        cos, sin = self.rope.tables(batch.positions, self.dtype)
        return _Step(cos, sin, batch.write_index, batch.plans or self._plans(batch, kv.page_size))

    def _plans(self, batch: ForwardBatch, page_size: int) -> dict[int, AttentionPlan]:
        assert batch.page_table is not None, "a batch without plans needs a page table"
        return {
            window: ops.plan_attention(batch.query_lens, batch.kv_lens, batch.page_table, page_size, window)
            for window in self._windows
        }

    def _attention(
        self,
        qkv: Tensor,
        layer: LayerParameters,
        step: _Step,
        plan: AttentionPlan | DevicePlan,
        k: Tensor,
        v: Tensor,
    ) -> Tensor:
        config = self.config
        num_tokens, num_rotated = qkv.shape[0], config.num_heads + config.num_kv_heads
        heads = qkv.view(num_tokens, num_rotated + config.num_kv_heads, config.head_dim)
        rotated, values = heads[:, :num_rotated], heads[:, num_rotated:]
        if layer.q_norm is not None and layer.k_norm is not None:
            rotated = self._norm_heads(rotated, layer.q_norm, layer.k_norm)
        queries = ops.rope_write_kv(rotated, values, step.cos, step.sin, k, v, step.write_index)
        attended = ops.paged_attention(queries, k, v, plan, self._scale)
        return attended.view(num_tokens, -1)

    def _norm_heads(self, rotated: Tensor, q_norm: Tensor, k_norm: Tensor) -> Tensor:
        eps, num_heads = self.config.norm_eps, self.config.num_heads
        queries = ops.rms_norm(rotated[:, :num_heads], q_norm, eps)
        keys = ops.rms_norm(rotated[:, num_heads:], k_norm, eps)
        return torch.cat((queries, keys), dim=1)

    def _logits(self, x: Tensor, residual: Tensor, logits_index: Tensor | None) -> Tensor:
        """Only the wanted rows pass the last norm and the vocabulary."""
        parameters = self.parameters
        if logits_index is not None:
            x, residual = x[logits_index], residual[logits_index]
        wanted = ops.add_rms_norm(x, residual, parameters.final_norm, self.config.norm_eps)
        return ops.linear(wanted, parameters.lm_head).to(torch.float32, memory_format=torch.contiguous_format)
