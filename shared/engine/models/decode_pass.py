"""The decoder's forward pass for steps of one new token per sequence, out of the kernels made for it.

The same function as `Decoder.forward`; what it saves are launches and round trips through memory between
the matrix products. Few rows go through products that carry norms, gates and the residual stream along;
many go through the decoder's own, and only attention is the decode kernel's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from phloem.kernels.types import DecodeRows, DecodeShape, StepWeights, norms_of
from phloem.shared.engine.models.decoder import Decoder
from phloem.shared.engine.models.kv_cache import KVCache
from phloem.shared.engine.models.parameters import LayerParameters
from phloem.shared.engine.models.registry import find_activation
from phloem.shared.model_store.model_config import ModelConfig

if TYPE_CHECKING:
    from phloem.kernels.triton_ops.decode_kernels import DecodeKernels


class DecodePass:
    """Reads the decoder's weights; holds no state of any request."""

    def __init__(self, decoder: Decoder, kernels: DecodeKernels) -> None:
        self._decoder = decoder
        self._config = decoder.config
        self._parameters = decoder.parameters
        self._kernels = kernels

    @torch.inference_mode()
    def forward(self, rows: DecodeRows, kv: KVCache) -> Tensor:
        """Writes the rows' K and V into their pages. Returns float32 logits, `[B, vocab]`."""
        if self._kernels.takes(len(rows.token)):
            return self._few_rows(rows, kv)
        return self._many_rows(rows, kv)

    def _few_rows(self, rows: DecodeRows, kv: KVCache) -> Tensor:
        parameters, kernels, eps = self._parameters, self._kernels, self._config.norm_eps
        gains = [layer.input_norm for layer in parameters.layers[1:]] + [parameters.final_norm]
        stream = kernels.begin(rows, parameters.embedding, parameters.layers[0].input_norm)
        for index, (layer, next_gain) in enumerate(zip(parameters.layers, gains, strict=True)):
            qkv = kernels.normed_linear(stream, layer.qkv, eps)
            attended = kernels.attend(qkv, rows, kv.k[index], kv.v[index], norms_of(layer), eps)
            stream = kernels.add_linear(attended, layer.o, stream, layer.post_norm)
            gated = kernels.gated_linear(stream, layer.gate_up, eps)
            stream = kernels.add_linear(gated, layer.down, stream, next_gain)
        return kernels.normed_linear(stream, parameters.lm_head, eps, torch.float32)

    def _many_rows(self, rows: DecodeRows, kv: KVCache) -> Tensor:
        eps = self._config.norm_eps

        def attend(index: int, layer: LayerParameters, qkv: Tensor) -> Tensor:
            return self._kernels.attend(qkv, rows, kv.k[index], kv.v[index], norms_of(layer), eps)

        tokens = torch.where(rows.token < 0, rows.last_token[rows.slot], rows.token)
        return self._decoder.decode(tokens, attend)


def decode_shape(config: ModelConfig) -> DecodeShape:
    return DecodeShape(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        activation=find_activation(config),
    )


def step_weights(decoder: Decoder) -> StepWeights:
    """What a step outside of the decoder reads."""
    found = decoder.parameters
    return StepWeights(
        found.embedding, found.layers, found.final_norm, found.lm_head, decoder.config.norm_eps
    )
