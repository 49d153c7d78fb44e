"""Where each tensor of a checkpoint goes: names to views of the (fused) parameters."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from phloem.kernels.types import LinearWeight
from phloem.shared.engine.models.parameters import DecoderParameters, LayerParameters
from phloem.shared.engine.models.registry import WeightNames
from phloem.shared.model_store.model_config import ModelConfig


def weight_slots(parameters: DecoderParameters, names: WeightNames, config: ModelConfig) -> dict[str, Tensor]:
    """Checkpoint name -> the view of the parameters that it fills; together they cover everything once."""
    slots = {names.embedding: parameters.embedding, names.final_norm: parameters.final_norm}
    if not config.tied_embeddings:
        slots[names.lm_head] = parameters.lm_head.weight
    for index, layer in enumerate(parameters.layers):
        slots.update(_layer_slots(layer, f"{names.layer_prefix}{index}.", names, config))
    return slots


def _layer_slots(
    layer: LayerParameters, prefix: str, names: WeightNames, config: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    own = names.layer
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    inner, hidden = config.intermediate_size, config.hidden_size
    yield f"{prefix}{own.input_norm}.weight", layer.input_norm
    yield f"{prefix}{own.post_norm}.weight", layer.post_norm
    yield from _stacked(layer.qkv, prefix, [(own.q, q_size), (own.k, kv_size), (own.v, kv_size)])
    yield from _stacked(layer.o, prefix, [(own.o, hidden)])
    yield from _stacked(layer.gate_up, prefix, [(own.gate, inner), (own.up, inner)])
    yield from _stacked(layer.down, prefix, [(own.down, hidden)])
    if layer.q_norm is not None and layer.k_norm is not None:
        yield f"{prefix}{own.q_norm}.weight", layer.q_norm
        yield f"{prefix}{own.k_norm}.weight", layer.k_norm


def _stacked(
    projection: LinearWeight, prefix: str, parts: list[tuple[str, int]]
) -> Iterator[tuple[str, Tensor]]:
    """The rows of a fused projection, part by part."""
    row = 0
    for name, num_rows in parts:
        yield f"{prefix}{name}.weight", projection.weight[row : row + num_rows]
        if projection.bias is not None:
            yield f"{prefix}{name}.bias", projection.bias[row : row + num_rows]
        row += num_rows
