"""Weights from files: everything lands once, and a bad file is named."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from phloem.shared.engine.models.batch import ForwardBatch
from phloem.shared.engine.models.decoder import Decoder
from phloem.shared.engine.models.kv_cache import KVCache
from phloem.shared.engine.weights.files import INDEX_FILE, stored_dtype
from phloem.shared.engine.weights.loader import load_decoder, resolve_dtype
from phloem.shared.errors import ConfigError, PhloemError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def save_model(directory: Path, shard_size: str = "1GB", dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), dtype=dtype)
    model.save_pretrained(directory, max_shard_size=shard_size)
    return directory


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model")


def load(
    directory: Path,
    load_format: str = "auto",
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Decoder:
    return load_decoder(directory, load_format=load_format, dtype=dtype, device=CPU, progress=progress)


def logits_of(decoder: Decoder) -> Tensor:
    at = torch.arange(9)
    kv = KVCache.allocate(decoder.config, 1, 16, decoder.dtype, CPU)
    return decoder.forward(ForwardBatch(at, at, at, [9], [9], torch.tensor([[0]]), at), kv)


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    path = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def test_shards_load_as_one_file_does(model_dir: Path, tmp_path: Path) -> None:
    sharded = save_model(tmp_path / "sharded", shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert torch.equal(logits_of(load(sharded)), logits_of(load(model_dir)))


def test_progress_counts_every_parameter_once(model_dir: Path) -> None:
    seen: list[tuple[int, int]] = []
    load(model_dir, progress=lambda done, total: seen.append((done, total)))
    expected = sum(tensor.numel() for tensor in load_file(model_dir / "model.safetensors").values())
    assert seen[-1] == (expected, expected)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_stored_dtype_is_converted_to_the_one_asked_for(tmp_path: Path) -> None:
    stored_low = save_model(tmp_path, dtype=torch.bfloat16)
    assert load(stored_low, dtype=torch.float32).dtype == torch.float32
    low, high = logits_of(load(stored_low, dtype=torch.bfloat16)), logits_of(load(stored_low))
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, high, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"],
)
def test_a_missing_tensor_is_named(name: str, model_dir: Path) -> None:
    rewrite(model_dir, lambda tensors: tensors.__delitem__(name))
    with pytest.raises(PhloemError, match=name) as caught:
        load(model_dir)
    assert caught.value.code == "bad_weights"


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.2.input_layernorm.weight"]
)
def test_an_unexpected_tensor_is_named(name: str, model_dir: Path) -> None:
    rewrite(model_dir, lambda tensors: tensors.update({name: torch.zeros(32)}))
    with pytest.raises(PhloemError, match=name) as caught:
        load(model_dir)
    assert caught.value.code == "bad_weights"


def test_a_misshaped_tensor_is_named_with_both_shapes(model_dir: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    rewrite(model_dir, lambda tensors: tensors.update({name: torch.zeros(16, 33)}))
    with pytest.raises(PhloemError, match=rf"{name}.*\(16, 33\).*\(16, 32\)"):
        load(model_dir)


def test_tensors_that_old_checkpoints_carry_are_passed_over(model_dir: Path) -> None:
    before = logits_of(load(model_dir))
    inverse = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    rewrite(model_dir, lambda tensors: tensors.update(inverse))
    assert torch.equal(logits_of(load(model_dir)), before)


def test_a_truncated_file_is_named(model_dir: Path) -> None:
    path = model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(PhloemError, match=r"model\.safetensors") as caught:
        load(model_dir)
    assert caught.value.code == "bad_weights"


def test_an_index_that_names_an_absent_shard_is_refused(tmp_path: Path) -> None:
    sharded = save_model(tmp_path, shard_size="20KB")
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(PhloemError, match=gone.name) as caught:
        load(sharded)
    assert caught.value.code == "bad_weights"


def test_pickled_weights_are_never_read(model_dir: Path) -> None:
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
    with pytest.raises(PhloemError, match="safetensors") as caught:
        load(model_dir)
    assert caught.value.code == "not_a_model"


def test_dummy_weights_are_seeded_and_need_no_file(model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    first, second = logits_of(load(model_dir, "dummy")), logits_of(load(model_dir, "dummy"))
    assert torch.equal(first, second)
    assert bool(first.isfinite().all())
    assert float(first.std()) > 0.0


def test_dummy_weights_cover_biases(tmp_path: Path) -> None:
    Qwen2Config(**SHAPE, architectures=["Qwen2ForCausalLM"]).save_pretrained(tmp_path)
    assert bool(logits_of(load(tmp_path, "dummy")).isfinite().all())


def test_an_unknown_load_format_is_refused(model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="safetensors, dummy"):
        load(model_dir, "pickle")


@pytest.mark.parametrize(
    ("stored", "device", "expected"),
    [
        ("float32", "cpu", torch.float32),
        ("float16", "cpu", torch.float32),
        ("bfloat16", "cpu", torch.float32),
        ("float16", "cuda", torch.float16),
        ("bfloat16", "cuda", torch.bfloat16),
    ],
)
def test_auto_dtype_is_the_models_own_on_a_gpu_and_float32_on_a_cpu(
    stored: str, device: str, expected: torch.dtype, model_dir: Path
) -> None:
    path = model_dir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": stored}))
    assert resolve_dtype("auto", model_dir, torch.device(device)) == expected


def rewrite_in(directory: Path, dtype: torch.dtype, norms: torch.dtype | None = None) -> None:
    def convert(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(norms if norms and "norm" in name else dtype)

    rewrite(directory, convert)


def store_dtype(model_dir: Path, name: str | None) -> None:
    path = model_dir / "config.json"
    config = json.loads(path.read_text())
    config.pop("dtype", None)
    path.write_text(json.dumps(config | ({"dtype": name} if name else {})))


@pytest.mark.parametrize("stored", ["float8_e4m3fn", "float64", "int8"])
def test_a_dtype_without_kernels_is_refused_on_a_gpu_with_the_remedy(stored: str, model_dir: Path) -> None:
    store_dtype(model_dir, stored)
    with pytest.raises(ConfigError) as caught:
        resolve_dtype("auto", model_dir, CUDA)
    assert caught.value.info.param == "dtype"
    assert str(caught.value) == (
        f"{model_dir}/config.json has the dtype {stored!r}, and the engine computes in float32, bfloat16 or "
        "float16: give --dtype bfloat16, to convert the weights as they are loaded"
    )
    assert resolve_dtype("bfloat16", model_dir, CUDA) == torch.bfloat16
    assert resolve_dtype("auto", model_dir, CPU) == torch.float32


def test_weights_of_a_dtype_without_kernels_are_converted_to_a_named_one(model_dir: Path) -> None:
    expected = logits_of(load(model_dir))
    rewrite_in(model_dir, torch.float64)
    store_dtype(model_dir, "float64")
    assert torch.equal(logits_of(load(model_dir, dtype=torch.float32)), expected)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_where_the_config_names_no_dtype_most_weights_decide(
    stored: torch.dtype, model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    store_dtype(model_dir, None)
    rewrite_in(model_dir, stored, norms=torch.float32)  # which are often kept wider
    assert resolve_dtype("auto", model_dir, CUDA) == stored
    (record,) = caplog.records
    assert f"taking {str(stored).removeprefix('torch.')}, which most" in record.getMessage()


def test_where_nothing_names_a_dtype_bfloat16_is_taken_and_said(
    model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store_dtype(model_dir, None)
    (model_dir / "model.safetensors").unlink()
    assert resolve_dtype("auto", model_dir, CUDA) == torch.bfloat16
    assert "names no dtype and holds no weights: taking bfloat16" in caplog.text


def test_weights_stored_without_a_name_in_a_dtype_without_kernels_are_refused(model_dir: Path) -> None:
    store_dtype(model_dir, None)
    rewrite_in(model_dir, torch.float8_e4m3fn)
    with pytest.raises(ConfigError, match=r"are stored in 'float8_e4m3fn', and .* give --dtype bfloat16"):
        resolve_dtype("auto", model_dir, CUDA)


def test_a_named_dtype_is_taken_as_it_is(model_dir: Path) -> None:
    assert resolve_dtype("bfloat16", model_dir, CPU) == torch.bfloat16
    with pytest.raises(ConfigError, match="float32, bfloat16, float16"):
        resolve_dtype("int3", model_dir, CPU)


# Loads a model and prints how far its private memory grew at most, in bytes.
MEASURE = """
import sys, threading
from pathlib import Path
import torch
from phloem.shared.engine.weights.loader import load_decoder

def private_bytes():
    line = next(l for l in open("/proc/self/status") if l.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

def watch():
    while not done.wait(0.001):
        seen.append(private_bytes())

before, seen, done = private_bytes(), [], threading.Event()
thread = threading.Thread(target=watch)
thread.start()
load_decoder(Path(sys.argv[1]), load_format="auto", dtype=torch.bfloat16, device=torch.device("cpu"),
             progress=lambda done, total: None)
done.set()
thread.join()
print(max(seen) - before)
"""


def test_weights_are_never_in_memory_twice(smollm2_dir: Path) -> None:
    command = [sys.executable, "-c", MEASURE, str(smollm2_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120.0)
    stored = (smollm2_dir / "model.safetensors").stat().st_size
    assert stored * 0.9 < int(done.stdout) < stored * 1.25


@pytest.mark.parametrize(
    "index",
    ["{}", '{"weight_map": {}}', '{"weight_map": 3}', "no json", '{"weight_map": {"a": "none.safetensors"}}'],
)
def test_weights_that_can_not_be_read_say_nothing_of_their_dtype(index: str, tmp_path: Path) -> None:
    """Whoever loads them will say what is wrong; dummy weights are loaded from nowhere."""
    (tmp_path / INDEX_FILE).write_text(index)
    assert stored_dtype(tmp_path) is None
