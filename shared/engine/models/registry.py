"""Which Hugging Face architectures the decoder runs: their flags and what they call their weights."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

from phloem.kernels.types import Activation
from phloem.shared.model_store.model_config import ModelConfig, unsupported

BiasRule: TypeAlias = Literal["never", "always", "config"]


class Architecture(NamedTuple):
    """The flags in which one architecture differs from the others.

    A bias rule of `config` follows the model's `attention_bias` or `mlp_bias`.
    """

    qkv_bias: BiasRule
    o_bias: BiasRule
    mlp_bias: BiasRule
    qk_norm: bool


class LayerNames(NamedTuple):
    """Names of one layer's weights in the checkpoint, under `model.layers.N.`; biases end in `.bias`."""

    input_norm: str = "input_layernorm"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    o: str = "self_attn.o_proj"
    post_norm: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"


class WeightNames(NamedTuple):
    """Names of a checkpoint's tensors."""

    embedding: str = "model.embed_tokens.weight"
    layer_prefix: str = "model.layers."
    final_norm: str = "model.norm.weight"
    lm_head: str = "lm_head.weight"
    layer: LayerNames = LayerNames()
    # Tensors that old checkpoints carry and that are computed here.
    ignored_suffixes: tuple[str, ...] = ("rotary_emb.inv_freq",)


class RegistryEntry(NamedTuple):
    flags: Architecture
    names: WeightNames


_NAMES = WeightNames()

# By transformers' names (its `activations.py`).
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}

REGISTRY: dict[str, RegistryEntry] = {
    "LlamaForCausalLM": RegistryEntry(Architecture("config", "config", "config", qk_norm=False), _NAMES),
    "MistralForCausalLM": RegistryEntry(Architecture("never", "never", "never", qk_norm=False), _NAMES),
    "Qwen2ForCausalLM": RegistryEntry(Architecture("always", "never", "never", qk_norm=False), _NAMES),
    "Qwen3ForCausalLM": RegistryEntry(Architecture("config", "config", "never", qk_norm=True), _NAMES),
}


def find_architecture(config: ModelConfig) -> RegistryEntry:
    """The registry's entry for this model; PhloemError `unsupported_model` names what is supported."""
    entry = REGISTRY.get(config.architecture)
    if entry is None:
        supported = ", ".join(REGISTRY)
        raise unsupported(f"architecture {config.architecture!r} is not supported; supported are {supported}")
    find_activation(config)
    if config.num_heads % config.num_kv_heads:
        raise unsupported(
            f"{config.num_heads} query heads cannot share {config.num_kv_heads} KV heads evenly; "
            "the number of query heads must be a multiple"
        )
    if config.head_dim % 2:
        raise unsupported(f"head_dim {config.head_dim} is odd; rotary embedding needs an even head_dim")
    return entry


def find_activation(config: ModelConfig) -> Activation:
    """The kernels' name of the model's `hidden_act`; PhloemError `unsupported_model` says what there is."""
    activation = _ACTIVATIONS.get(config.activation)
    if activation is None:
        supported = ", ".join(_ACTIVATIONS)
        raise unsupported(f"activation {config.activation!r} is not supported; supported are {supported}")
    return activation


def has_bias(rule: BiasRule, configured: bool) -> bool:
    """Whether a projection has a bias under `rule`, given the model's own setting."""
    return rule == "always" or (rule == "config" and configured)
