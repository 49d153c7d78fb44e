"""The decoder's weights: fused where one matrix product does the work of several."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from phloem.kernels import ops
from phloem.kernels.types import LinearWeight
from phloem.shared.engine.models.registry import Architecture, find_architecture, has_bias
from phloem.shared.model_store.model_config import ModelConfig


class LayerParameters(NamedTuple):
    """One layer. `qkv` stacks q, k, v; `gate_up` stacks gate, up; the norms of q and k are Qwen3's."""

    input_norm: Tensor
    qkv: LinearWeight
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: LinearWeight
    post_norm: Tensor
    gate_up: LinearWeight
    down: LinearWeight


class DecoderParameters(NamedTuple):
    """All weights of a decoder; with tied embeddings `lm_head` holds the embedding itself."""

    embedding: Tensor
    layers: list[LayerParameters]
    final_norm: Tensor
    lm_head: LinearWeight


def prepare_parameters(plain: DecoderParameters) -> DecoderParameters:
    """The weights in the device's layout. Empties `plain.layers` on the way, so that at no time more than
    one layer is in memory twice."""
    layers = []
    while plain.layers:
        layers.append(_prepare_layer(plain.layers.pop(0)))
    is_tied = plain.lm_head.weight is plain.embedding
    lm_head = ops.prepare_linear(plain.lm_head, shared=is_tied)
    embedding = lm_head.weight if is_tied else plain.embedding
    return plain._replace(layers=layers, lm_head=lm_head, embedding=embedding)


def _prepare_layer(plain: LayerParameters) -> LayerParameters:
    return plain._replace(
        qkv=ops.prepare_linear(plain.qkv),
        o=ops.prepare_linear(plain.o),
        gate_up=ops.prepare_linear(plain.gate_up),
        down=ops.prepare_linear(plain.down),
    )


class ParameterFactory:
    """Makes uninitialised parameters of the right shapes for a model."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._config = config
        self._flags: Architecture = find_architecture(config).flags
        self._dtype = dtype
        self._device = device

    def make(self) -> DecoderParameters:
        config = self._config
        embedding = self._empty(config.vocab_size, config.hidden_size)
        return DecoderParameters(
            embedding=embedding,
            layers=[self._layer() for _ in range(config.num_layers)],
            final_norm=self._empty(config.hidden_size),
            lm_head=LinearWeight(embedding if config.tied_embeddings else torch.empty_like(embedding)),
        )

    def _layer(self) -> LayerParameters:
        config, flags = self._config, self._flags
        hidden, inner = config.hidden_size, config.intermediate_size
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        mlp_bias = has_bias(flags.mlp_bias, config.mlp_bias)
        return LayerParameters(
            input_norm=self._empty(hidden),
            qkv=self._projection(
                q_size + 2 * kv_size, hidden, has_bias(flags.qkv_bias, config.attention_bias)
            ),
            q_norm=self._empty(config.head_dim) if flags.qk_norm else None,
            k_norm=self._empty(config.head_dim) if flags.qk_norm else None,
            o=self._projection(hidden, q_size, has_bias(flags.o_bias, config.attention_bias)),
            post_norm=self._empty(hidden),
            gate_up=self._projection(2 * inner, hidden, mlp_bias),
            down=self._projection(hidden, inner, mlp_bias),
        )

    def _projection(self, num_out: int, num_in: int, bias: bool) -> LinearWeight:
        return LinearWeight(self._empty(num_out, num_in), self._empty(num_out) if bias else None)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._device)
