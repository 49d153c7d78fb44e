"""The decoder against Hugging Face's own implementation: tiny random models, and the demo model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from phloem.shared.engine.models.batch import ForwardBatch
from phloem.shared.engine.models.decoder import Decoder
from phloem.shared.engine.models.kv_cache import KVCache, bytes_per_page
from phloem.shared.engine.weights.loader import load_decoder
from phloem.shared.errors import PhloemError
from phloem.shared.model_store.model_config import load_model_config

CPU = torch.device("cpu")
PROMPT_LEN = 40
VOCAB = 199
TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}
QWEN_WINDOWS = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}

MODELS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama-tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "llama-biases-wide-heads": (LlamaConfig, {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "llama-gelu": (LlamaConfig, {"hidden_act": "gelu"}),
    "llama-gelu-tanh": (LlamaConfig, {"hidden_act": "gelu_pytorch_tanh"}),
    "llama-multi-query": (LlamaConfig, {"num_key_value_heads": 1}),
    "llama3-rope": (LlamaConfig, {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": (LlamaConfig, {"rope_parameters": LINEAR_ROPE}),
    "qwen2": (Qwen2Config, {"rms_norm_eps": 1e-3}),
    "qwen2-yarn-rope": (Qwen2Config, {"rope_parameters": YARN_ROPE}),
    "qwen2-some-windows": (Qwen2Config, QWEN_WINDOWS),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "qwen3-tied-biases": (Qwen3Config, {"head_dim": 8, "tie_word_embeddings": True, "attention_bias": True}),
    "mistral-window-shorter-than-prompt": (MistralConfig, {"sliding_window": 11}),
    "mistral-no-window": (MistralConfig, {"sliding_window": None, "head_dim": 16}),
}


def randomise(model: torch.nn.Module) -> None:
    """Norms and biases start as ones and zeros, which would hide a swapped or forgotten one."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2


def save_tiny(name: str, directory: Path) -> Any:
    torch.manual_seed(0)
    config_type, changes = MODELS[name]
    model = AutoModelForCausalLM.from_config(config_type(**(TINY | changes)), attn_implementation="eager")
    randomise(model)
    model.save_pretrained(directory)
    return model.eval()


class PagedRun:
    """Feeds sequences to a decoder in chunks, over pages in shuffled order."""

    def __init__(self, decoder: Decoder, num_sequences: int, page_size: int, max_len: int) -> None:
        pages_each = -(-max_len // page_size)
        shuffled = torch.randperm(num_sequences * pages_each, generator=torch.Generator().manual_seed(2))
        self._decoder = decoder
        self._page_size = page_size
        self._page_table = shuffled.view(num_sequences, pages_each)
        self._kv = KVCache.allocate(decoder.config, len(shuffled), page_size, torch.float32, CPU)

    def step(self, tokens: list[Tensor], starts: list[int]) -> list[Tensor]:
        """One engine step; sequences with no tokens sit it out. Returns the logits of every token."""
        rows = [row for row, ids in enumerate(tokens) if len(ids)]
        positions = [torch.arange(starts[row], starts[row] + len(tokens[row])) for row in rows]
        slots = [
            self._page_table[row][at // self._page_size] * self._page_size + at % self._page_size
            for row, at in zip(rows, positions, strict=True)
        ]
        lens = [len(at) for at in positions]
        batch = ForwardBatch(
            input_ids=torch.cat([tokens[row] for row in rows]),
            positions=torch.cat(positions),
            write_index=torch.cat(slots),
            query_lens=lens,
            kv_lens=[starts[row] + count for row, count in zip(rows, lens, strict=True)],
            page_table=self._page_table[rows],
            logits_index=torch.arange(sum(lens)),
        )
        logits = torch.split_with_sizes(self._decoder.forward(batch, self._kv), lens)
        by_row = dict(zip(rows, logits, strict=True))
        empty = torch.empty(0, self._decoder.config.vocab_size)
        return [by_row.get(row, empty) for row in range(len(tokens))]


def paged_logits(run: PagedRun, sequences: list[Tensor], cuts: list[list[int]]) -> list[Tensor]:
    """Logits of all tokens; sequence i is fed in the chunks between the entries of `cuts[i]`."""
    chunks = [list(pairwise(places)) for places in cuts]
    found: list[list[Tensor]] = [[] for _ in sequences]
    for index in range(max(len(mine) for mine in chunks)):
        spans = [mine[index] if index < len(mine) else (0, 0) for mine in chunks]
        tokens = [ids[start:end] for ids, (start, end) in zip(sequences, spans, strict=True)]
        for own, logits in zip(found, run.step(tokens, [start for start, _ in spans]), strict=True):
            own.append(logits)
    return [torch.cat(parts) for parts in found]


def load(directory: Path) -> Decoder:
    return load_decoder(
        directory, load_format="auto", dtype=torch.float32, device=CPU, progress=lambda done, total: None
    )


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("name", list(MODELS))
def test_logits_agree_with_transformers_in_chunks_and_decode_steps(
    name: str, page_size: int, tmp_path: Path
) -> None:
    reference = save_tiny(name, tmp_path)
    ids = torch.randint(1, VOCAB, (3, PROMPT_LEN), generator=torch.Generator().manual_seed(3))
    sequences = [ids[0], ids[1, :23], ids[2, :31]]
    # A whole prompt then decode steps; ragged chunks; single tokens from the first on.
    cuts = [[0, 30, *range(31, PROMPT_LEN + 1)], [0, 7, 16, 17, 23], list(range(32))]
    run = PagedRun(load(tmp_path), len(sequences), page_size, PROMPT_LEN)
    found = paged_logits(run, sequences, cuts)
    for sequence, logits in zip(sequences, found, strict=True):
        with torch.inference_mode():
            expected = reference(sequence.unsqueeze(0)).logits[0]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_only_wanted_rows_are_returned_in_the_order_asked_for(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    decoder = load(tmp_path)
    kv = KVCache.allocate(decoder.config, 4, 16, torch.float32, CPU)
    at = torch.arange(20)
    everything = ForwardBatch(at + 1, at, at, [20], [20], torch.tensor([[0, 1]]), at)
    logits = decoder.forward(everything, kv)
    assert logits.dtype == torch.float32
    wanted = torch.tensor([19, 3])
    some = decoder.forward(everything._replace(logits_index=wanted), kv)
    torch.testing.assert_close(some, logits[wanted], rtol=1e-5, atol=1e-5)


def test_a_step_without_wanted_logits_returns_none_and_still_writes_kv(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    decoder = load(tmp_path)
    kv = KVCache.allocate(decoder.config, 1, 16, torch.float32, CPU)
    for plane in (*kv.k, *kv.v):
        plane.zero_()
    at = torch.arange(8)
    batch = ForwardBatch(at + 1, at, at, [8], [8], torch.tensor([[0]]), torch.empty(0, dtype=torch.int64))
    assert decoder.forward(batch, kv).shape == (0, VOCAB)
    assert all(bool((k[0, :8] != 0).any(-1).all()) for k in kv.k)
    assert all(bool((k[0, 8:] == 0).all()) for k in kv.k)


def test_bytes_per_page_is_what_the_cache_holds(tmp_path: Path) -> None:
    save_tiny("qwen3", tmp_path)
    config = load_model_config(tmp_path)
    kv = KVCache.allocate(config, 5, 16, torch.bfloat16, CPU)
    held = sum(plane.numel() * plane.element_size() for plane in (*kv.k, *kv.v))
    assert held == 5 * bytes_per_page(config, 16, torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "LlamaForCausalLM, MistralForCausalLM"),
        ({"hidden_act": "relu2"}, "silu, swish, gelu, gelu_new, gelu_pytorch_tanh"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "default, linear, llama3, yarn"),
        ({"num_key_value_heads": 4}, "multiple"),
        ({"head_dim": 7}, "even"),
    ],
)
def test_unsupported_values_name_what_is_supported(
    change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    save_tiny("llama", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(PhloemError, match=named) as caught:
        load(tmp_path)
    assert caught.value.code == "unsupported_model"


@pytest.fixture(scope="module")
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_demo_model_agrees_with_transformers(smollm2_dir: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()
    ids = torch.randint(3, 49_000, (96,), generator=torch.Generator().manual_seed(4))
    run = PagedRun(load(smollm2_dir), 1, 16, 96)
    found = paged_logits(run, [ids], [[0, 50, 80, *range(81, 97)]])[0]
    with torch.inference_mode():
        expected = reference(ids.unsqueeze(0)).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
