"""The least time a step can take: bytes over bandwidth, or operations over the matrix rate. Pure."""

from __future__ import annotations

from typing import NamedTuple

from phloem.shared.engine.offline.ceilings import Ceilings
from phloem.shared.model_store.model_config import ModelConfig


class ModelCost(NamedTuple):
    """matmul_params: weights that every token is multiplied with, the vocabulary apart; weight_bytes: what a
    decode step reads of the weights (all but the embedding table)."""

    matmul_params: int
    vocab_params: int
    weight_bytes: int
    kv_bytes_per_token: int
    attention_flops_per_pair: int  # per (query, key): scores and the weighted sum, all layers and heads


def model_cost(config: ModelConfig, bytes_per_value: int) -> ModelCost:
    hidden, head_dim = config.hidden_size, config.head_dim
    q, kv = config.num_heads * head_dim, config.num_kv_heads * head_dim
    layer = hidden * (q + 2 * kv) + q * hidden + 3 * hidden * config.intermediate_size
    matmul, vocab = config.num_layers * layer, hidden * config.vocab_size
    return ModelCost(
        matmul_params=matmul,
        vocab_params=vocab,
        weight_bytes=(matmul + vocab) * bytes_per_value,
        kv_bytes_per_token=2 * config.num_layers * kv * bytes_per_value,
        attention_flops_per_pair=4 * config.num_layers * q,
    )


def decode_floor_s(cost: ModelCost, ceilings: Ceilings, batch: int, context: int) -> float:
    """(weight bytes + KV bytes read) / read bandwidth."""
    return (cost.weight_bytes + batch * context * cost.kv_bytes_per_token) / ceilings.read_bytes_per_s


def prefill_floor_s(cost: ModelCost, ceilings: Ceilings, num_tokens: int) -> float:
    """Operations / matrix rate; causal attention sees half of the pairs, logits are of one token."""
    matmul = 2 * (cost.matmul_params * num_tokens + cost.vocab_params)
    attention = cost.attention_flops_per_pair * num_tokens * (num_tokens + 1) // 2
    return (matmul + attention) / ceilings.flops_per_s
