"""Models without weights: a `config.json` is all that `--load-format dummy` needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, TypeAlias

ModelShape: TypeAlias = Literal["llama-3.1-8b", "exact", "tiny"]

_COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

# Layers, hidden, intermediate, heads, KV heads, head_dim, vocabulary. "exact" is small enough for float32,
# "tiny" is for CPUs. Both move much KV for what they compute: 32 and 16 KiB a token.
_SHAPES: dict[ModelShape, tuple[int, int, int, int, int, int, int]] = {
    "llama-3.1-8b": (32, 4096, 14336, 32, 8, 128, 128256),
    "exact": (8, 256, 512, 8, 8, 64, 512),
    "tiny": (4, 64, 128, 8, 8, 64, 256),
}


def write_model(shape: ModelShape, folder: Path) -> Path:
    """Makes `folder` a model directory of this shape, and returns it."""
    layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary = _SHAPES[shape]
    config = _COMMON | {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocabulary,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def write_weights(folder: Path, seed: int = 0) -> Path:
    """Gives a model directory random float32 weights under which attention is peaky: with the tiny ones of
    `--load-format dummy` a wrong page among many would hardly change a token.

    Wants torch and safetensors.
    """
    import torch
    from safetensors.torch import save_file

    config = json.loads((folder / "config.json").read_text())
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.ones(shape)
        if len(shape) == 1
        else torch.randn(shape, generator=generator) * 1.5 * shape[1] ** -0.5
        for name, shape in _tensor_shapes(config).items()
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def _tensor_shapes(config: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes (`[out, in]`) of a Llama checkpoint without biases."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    q_size = config["num_attention_heads"] * config["head_dim"]
    kv_size = config["num_key_value_heads"] * config["head_dim"]
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (q_size, hidden),
        "self_attn.k_proj": (kv_size, hidden),
        "self_attn.v_proj": (kv_size, hidden),
        "self_attn.o_proj": (hidden, q_size),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config["vocab_size"], hidden),
    }
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    return shapes
