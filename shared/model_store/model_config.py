"""A model's shape, read from Hugging Face's config.json and generation_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import msgspec

from phloem.shared.errors import PhloemError

RopeKind: TypeAlias = Literal["default", "linear", "llama3", "yarn"]
ROPE_KINDS: tuple[str, ...] = ("default", "linear", "llama3", "yarn")

# What a config file holds before it is checked.
JsonObject: TypeAlias = Mapping[str, Any]


class RopeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary embedding: base frequency and how it is stretched past the context of pre-training."""

    kind: RopeKind = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_context: int = 0  # context of pre-training in tokens (llama3, yarn)
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn: scale of cos and sin; None: from the factor
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine and the gateway know about a model without loading it."""

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int  # longest prompt + output in tokens
    norm_eps: float
    activation: str
    attention_bias: bool
    mlp_bias: bool
    tied_embeddings: bool
    rope: RopeConfig
    layer_windows: tuple[int, ...]  # per layer: tokens that a token sees, itself included; 0: all
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str  # of the stored weights, as torch spells it ("bfloat16"); "": the file doesn't say


def load_model_config(model_dir: Path) -> ModelConfig:
    """Reads `model_dir/config.json`, and the end-of-sequence ids of generation_config.json if it is there.

    Raises PhloemError: `not_a_model` when a file is missing or malformed, `unsupported_model` when a value
    is one that no part of Phloem can run.
    """
    config = _read_json(model_dir / "config.json")
    generation_path = model_dir / "generation_config.json"
    generation = _read_json(generation_path) if generation_path.exists() else {}
    try:
        return parse_model_config(config, generation)
    except (KeyError, TypeError, ValueError) as error:
        raise _malformed(model_dir / "config.json", f"{type(error).__name__}: {error}") from error


def parse_model_config(config: JsonObject, generation: JsonObject) -> ModelConfig:
    """The same from parsed JSON; KeyError, TypeError or ValueError name what is missing or malformed."""
    num_layers = int(config["num_hidden_layers"])
    num_heads = int(config["num_attention_heads"])
    hidden_size = int(config["hidden_size"])
    context_length = int(config["max_position_embeddings"])
    bos_token_id = config.get("bos_token_id")
    architecture = _architecture(config)
    return ModelConfig(
        architecture=architecture,
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=int(config["intermediate_size"]),
        num_heads=num_heads,
        num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
        head_dim=int(config.get("head_dim") or _default_head_dim(architecture, hidden_size // num_heads)),
        vocab_size=int(config["vocab_size"]),
        context_length=context_length,
        norm_eps=float(config["rms_norm_eps"]),
        activation=str(config.get("hidden_act", "silu")),
        attention_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        rope=_rope(config, context_length),
        layer_windows=_layer_windows(config, architecture, num_layers),
        bos_token_id=None if bos_token_id is None else int(bos_token_id),
        eos_token_ids=_token_ids(generation.get("eos_token_id", config.get("eos_token_id"))),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch."),
    )


def _architecture(config: JsonObject) -> str:
    architectures = config.get("architectures") or []
    if len(architectures) != 1:
        raise ValueError(f"`architectures` must name one class, found {architectures!r}")
    return str(architectures[0])


def _default_head_dim(architecture: str, even_share: int) -> int:
    return 128 if architecture == "Qwen3ForCausalLM" else even_share


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(item) for item in (value if isinstance(value, list) else [value]))


def _rope(config: JsonObject, context_length: int) -> RopeConfig:
    # transformers 5 writes `rope_parameters`; before, `rope_theta` and `rope_scaling` stood apart.
    values: JsonObject = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = str(values.get("rope_type", values.get("type", "default")))
    if kind not in ROPE_KINDS:
        raise unsupported(f"rope type {kind!r} is not supported; supported are {', '.join(ROPE_KINDS)}")
    if float(config.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))) != 1.0:
        raise unsupported("a partial rotary embedding is not supported; `partial_rotary_factor` must be 1")
    return RopeConfig(
        kind=cast("RopeKind", kind),
        theta=float(values.get("rope_theta", config.get("rope_theta", 10_000.0))),
        factor=float(values.get("factor", 1.0)),
        original_context=int(values.get("original_max_position_embeddings") or context_length),
        low_freq_factor=float(values.get("low_freq_factor", 1.0)),
        high_freq_factor=float(values.get("high_freq_factor", 4.0)),
        beta_fast=float(values.get("beta_fast") or 32.0),
        beta_slow=float(values.get("beta_slow") or 1.0),
        attention_factor=_optional_float(values.get("attention_factor")),
        mscale=_optional_float(values.get("mscale")),
        mscale_all_dim=_optional_float(values.get("mscale_all_dim")),
        truncate=bool(values.get("truncate", True)),
    )


def _optional_float(value: float | None) -> float | None:
    return None if value is None else float(value)


def _layer_windows(config: JsonObject, architecture: str, num_layers: int) -> tuple[int, ...]:
    """Hugging Face's rules: Mistral has no switch, Qwen needs one and starts at a layer, others have none."""
    if architecture == "MistralForCausalLM":
        window, first_layer = int(config.get("sliding_window", 4096) or 0), 0
    elif architecture.startswith("Qwen") and config.get("use_sliding_window", False):
        window, first_layer = int(config.get("sliding_window") or 0), int(config.get("max_window_layers", 28))
    else:
        window, first_layer = 0, 0
    layer_types = config.get("layer_types")
    if layer_types is not None:
        return tuple(window if kind == "sliding_attention" else 0 for kind in layer_types)
    return tuple(window if layer >= first_layer else 0 for layer in range(num_layers))


def unsupported(message: str) -> PhloemError:
    """The model is a model, but not one that Phloem can run."""
    return PhloemError("unsupported_model", message, http_status=500, param="model_path")


def _read_json(path: Path) -> JsonObject:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError as error:
        raise _malformed(path, "the file is missing") from error
    except msgspec.MsgspecError as error:
        raise _malformed(path, str(error)) from error


def _malformed(path: Path, reason: str) -> PhloemError:
    message = f"{path} does not describe a model ({reason}); give a complete Hugging Face directory"
    return PhloemError("not_a_model", message, http_status=500, param="model_path")
