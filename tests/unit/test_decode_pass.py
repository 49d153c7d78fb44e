"""A step of the decode kernels (in Triton's interpreter) against the decoder's own forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from phloem.kernels.triton_ops.decode_kernels import DecodeKernels
from phloem.kernels.triton_ops.tilings import choose_tiling
from phloem.kernels.types import DecodeRows
from phloem.shared.engine.models.batch import ForwardBatch
from phloem.shared.engine.models.decode_pass import DecodePass, decode_shape
from phloem.shared.engine.models.decoder import Decoder
from phloem.shared.engine.models.kv_cache import KVCache
from phloem.shared.engine.models.parameters import ParameterFactory
from phloem.shared.engine.models.registry import find_architecture
from phloem.shared.engine.weights.slots import weight_slots
from phloem.shared.model_store.model_config import parse_model_config
from tests.support.device_ops import relative_error
from tests.support.key_work import key_work

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels for real")

CPU = torch.device("cpu")
PAGE_SIZE = 16
VOCAB = 192
TINY: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def decoder_of(architecture: str, hidden_act: str) -> Decoder:
    """Random float32 weights; Qwen2 has biases, Qwen3 norms of q and k."""
    config = parse_model_config({"architectures": [architecture], "hidden_act": hidden_act, **TINY}, {})
    parameters = ParameterFactory(config, torch.float32, CPU).make()
    generator = torch.Generator().manual_seed(5)
    for slot in weight_slots(parameters, find_architecture(config).names, config).values():
        slot.normal_(1.0 if slot.dim() == 1 else 0.0, 0.15, generator=generator)
    return Decoder(config, parameters)


class Lengths:
    """Sequences at different places, over shuffled pages."""

    def __init__(self, lengths: list[int]) -> None:
        self.positions = torch.tensor(lengths) - 1
        self.table = torch.randperm(4 * len(lengths)).view(len(lengths), 4)
        page = self.table[torch.arange(len(lengths)), self.positions // PAGE_SIZE]
        self.write_index = page * PAGE_SIZE + self.positions % PAGE_SIZE


def expected(decoder: Decoder, at: Lengths, tokens: Tensor, kv: KVCache) -> Tensor:
    return decoder.forward(
        ForwardBatch(
            input_ids=tokens,
            positions=at.positions,
            write_index=at.write_index,
            query_lens=[1] * len(tokens),
            kv_lens=(at.positions + 1).tolist(),
            page_table=at.table,
        ),
        kv,
    )


@pytest.mark.parametrize("few", [True, False], ids=["few rows", "many rows"])
@pytest.mark.parametrize(
    ("architecture", "hidden_act"),
    [
        ("LlamaForCausalLM", "silu"),
        ("LlamaForCausalLM", "gelu"),
        ("Qwen2ForCausalLM", "silu"),
        ("Qwen3ForCausalLM", "gelu_pytorch_tanh"),
    ],
)
def test_logits_and_kv_are_the_decoders(
    architecture: str, hidden_act: str, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = decoder_of(architecture, hidden_act)
    at, tokens = Lengths([1, 17, 40]), torch.randint(0, VOCAB, (3,))
    pages = 4 * len(tokens)
    mine, theirs = (KVCache.allocate(decoder.config, pages, PAGE_SIZE, torch.float32, CPU) for _ in range(2))
    for ours, other in zip(mine.k + mine.v, theirs.k + theirs.v, strict=True):
        ours.normal_()
        other.copy_(ours)
    slots, last_token = torch.tensor([2, 0, 1]), torch.randint(0, VOCAB, (3,))
    page_table = torch.zeros((3, 4), dtype=torch.int32)
    page_table[slots] = at.table.to(torch.int32)
    cos, sin = decoder.rope.halves(128, torch.float32)
    given = tokens.clone()
    given[1] = -1
    last_token[slots[1]] = tokens[1]
    work = key_work(slots, at.positions + 1, decoder.config.num_kv_heads)
    kernels = DecodeKernels(decode_shape(decoder.config), CPU, max_rows=3)
    if not few:
        monkeypatch.setattr(kernels, "takes", lambda num_rows: False)
    assert kernels.takes(3) is few
    logits = DecodePass(decoder, kernels).forward(
        DecodeRows(given, slots, at.positions, at.write_index, last_token, page_table, work, cos, sin), mine
    )
    assert relative_error(logits, expected(decoder, at, tokens, theirs)) < 1e-5
    for ours, other in zip(mine.k + mine.v, theirs.k + theirs.v, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)


LLAMA_8B = [("normed", 6144, 4096), ("adds", 4096, 4096), ("gated", 14336, 4096), ("adds", 4096, 14336)]
QWEN_7B = [("normed", 4608, 3584), ("adds", 3584, 3584), ("gated", 18944, 3584), ("adds", 3584, 18944)]
SMOL = [("normed", 960, 576), ("adds", 576, 576), ("gated", 1536, 576), ("adds", 576, 1536)]
VOCABULARIES = [("normed", 128256, 4096), ("normed", 152064, 3584), ("normed", 49152, 576)]


@pytest.mark.parametrize("num_rows", [1, 16, 17, 64])
@pytest.mark.parametrize(("product", "n", "k"), LLAMA_8B + QWEN_7B + SMOL + VOCABULARIES)
def test_tiles_divide_the_weight(product: Any, n: int, k: int, num_rows: int) -> None:
    tiling = choose_tiling(product, n, k, num_rows, hopper=True)
    assert tiling is not None
    assert n % tiling.block_n == 0
    assert k % (tiling.block_k * tiling.split_k) == 0
    rows = tiling.block_n * (2 if product == "gated" else 1) + max(16, 1 << (num_rows - 1).bit_length())
    assert tiling.stages * rows * tiling.block_k * 2 <= 220 << 10, "shared memory of a Hopper SM"


def test_shapes_without_tiles_are_left_alone() -> None:
    assert choose_tiling("normed", 1000, 4096, 1, hopper=True) is None
    assert choose_tiling("normed", 4096, 4096, 65, hopper=True) is None
