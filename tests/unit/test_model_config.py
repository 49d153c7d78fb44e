"""What config.json says: defaults per architecture, old and new spellings, and clear refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from phloem.shared.errors import PhloemError
from phloem.shared.model_store.model_config import load_model_config, parse_model_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "vocab_size": 100,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
}


def test_what_is_absent_has_hugging_faces_defaults() -> None:
    config = parse_model_config(LLAMA, {})
    assert (config.num_kv_heads, config.head_dim, config.context_length) == (4, 16, 2048)
    assert (config.rope.kind, config.rope.theta) == ("default", 10_000.0)
    assert (config.dtype, config.tied_embeddings, config.layer_windows) == ("", False, (0,) * 4)
    assert (config.eos_token_ids, config.bos_token_id) == ((2,), None)


def test_old_and_new_spellings_mean_the_same() -> None:
    old = {"torch_dtype": "bfloat16", "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {
        "dtype": "bfloat16",
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
    }
    assert parse_model_config(LLAMA | old, {}) == parse_model_config(LLAMA | new, {})
    spelt = parse_model_config(LLAMA | old | {"torch_dtype": "torch.bfloat16"}, {})
    assert spelt.dtype == parse_model_config(LLAMA | new, {}).dtype == "bfloat16"


def test_generation_config_decides_where_a_sequence_ends() -> None:
    assert parse_model_config(LLAMA, {"eos_token_id": [7, 8]}).eos_token_ids == (7, 8)


@pytest.mark.parametrize(
    ("architecture", "changes", "windows"),
    [
        ("MistralForCausalLM", {}, (4096,) * 4),
        ("MistralForCausalLM", {"sliding_window": None}, (0,) * 4),
        ("MistralForCausalLM", {"sliding_window": 32}, (32,) * 4),
        ("LlamaForCausalLM", {"sliding_window": 32}, (0,) * 4),
        ("Qwen2ForCausalLM", {"sliding_window": 32}, (0,) * 4),
        ("Qwen2ForCausalLM", {"sliding_window": 32, "use_sliding_window": False}, (0,) * 4),
        (
            "Qwen2ForCausalLM",
            {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 3},
            (0, 0, 0, 32),
        ),
        (
            "Qwen3ForCausalLM",
            {
                "sliding_window": 32,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (32, 0, 32, 0),
        ),
    ],
)
def test_windows_follow_each_architectures_rule(
    architecture: str, changes: dict[str, Any], windows: tuple[int, ...]
) -> None:
    config = parse_model_config(LLAMA | {"architectures": [architecture]} | changes, {})
    assert config.layer_windows == windows


def test_qwen3_has_heads_of_128_unless_it_says_otherwise() -> None:
    assert parse_model_config(LLAMA | {"architectures": ["Qwen3ForCausalLM"]}, {}).head_dim == 128


def test_llama3_rope_is_read_whole() -> None:
    values = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling = values | {"original_max_position_embeddings": 8192}
    rope = parse_model_config(LLAMA | {"rope_theta": 5e5, "rope_scaling": scaling}, {}).rope
    assert (rope.kind, rope.theta, rope.factor, rope.original_context) == ("llama3", 5e5, 32.0, 8192)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "config.json"),
        ("[1]", "config.json"),
        (json.dumps({k: v for k, v in LLAMA.items() if k != "hidden_size"}), "hidden_size"),
        (json.dumps(LLAMA | {"architectures": []}), "architectures"),
        (json.dumps(LLAMA | {"vocab_size": "many"}), "many"),
    ],
)
def test_a_malformed_config_is_not_a_model(content: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(PhloemError, match=reason) as caught:
        load_model_config(tmp_path)
    assert caught.value.code == "not_a_model"


@pytest.mark.parametrize(
    "changes",
    [{"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, {"partial_rotary_factor": 0.5}],
)
def test_rotary_embeddings_that_no_part_can_run_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(PhloemError) as caught:
        parse_model_config(LLAMA | changes, {})
    assert caught.value.code == "unsupported_model"


def test_the_model_store_never_imports_torch() -> None:
    modules = "resolve, pull, conversion, hub, model_config"
    heavy = "{'torch', 'transformers', 'numpy', 'safetensors', 'huggingface_hub'}"
    code = f"import sys\nfrom phloem.shared.model_store import {modules}\nprint({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
