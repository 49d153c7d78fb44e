"""The decode kernels on CUDA, captured and replayed, against the decoder's own forward pass in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from phloem.kernels import ops
from phloem.kernels.triton_ops.decode_kernels import DecodeKernels
from phloem.kernels.triton_ops.key_shares import MANY, ONE_EACH
from phloem.kernels.types import DecodeRows
from phloem.shared.engine.cooperative_steps import CooperativeStep
from phloem.shared.engine.models.batch import ForwardBatch
from phloem.shared.engine.models.decode_pass import DecodePass, decode_shape, step_weights
from phloem.shared.engine.models.decoder import Decoder
from phloem.shared.engine.models.kv_cache import KVCache
from phloem.shared.engine.models.parameters import DecoderParameters, LayerParameters, ParameterFactory
from phloem.shared.engine.models.registry import find_architecture
from phloem.shared.engine.weights.slots import weight_slots
from phloem.shared.model_store.model_config import ModelConfig, parse_model_config
from tests.support.device_ops import relative_error
from tests.support.hopper import skip_unless_hopper
from tests.support.key_work import key_work

pytestmark = pytest.mark.gpu

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PAGE_SIZE, MAX_PAGES = 16, 40
SHAPE: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "max_position_embeddings": 2048,
    "vocab_size": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
# The last: attention is Triton's between launches of products, too.
HEADS = [(8, 2, 64), (4, 4, 128), (8, 1, 128), (4, 1, 256), (9, 3, 64)]
# bfloat16 carries 8 bits; three layers of rounded activations.
TOLERANCE = 2e-2


def tensors(parameters: DecoderParameters, device: torch.device, dtype: torch.dtype) -> DecoderParameters:
    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device=device, dtype=dtype)
        if isinstance(value, LayerParameters) or hasattr(value, "weight"):
            return type(value)(*(move(part) for part in value))
        return [move(part) for part in value] if isinstance(value, list) else value

    return DecoderParameters(*(move(part) for part in parameters))


def model(architecture: str, heads: tuple[int, int, int]) -> tuple[ModelConfig, DecoderParameters]:
    names = ("num_attention_heads", "num_key_value_heads", "head_dim")
    raw = {"architectures": [architecture], **SHAPE, **dict(zip(names, heads, strict=True))}
    config = parse_model_config(raw, {})
    parameters = ParameterFactory(config, torch.float32, CPU).make()
    generator = torch.Generator().manual_seed(5)
    for slot in weight_slots(parameters, find_architecture(config).names, config).values():
        slot.normal_(1.0 if slot.dim() == 1 else 0.0, 0.05, generator=generator)
    return config, tensors(parameters, CPU, torch.bfloat16)


def cooperative_step(made_by: str, decoder: Decoder, kv: KVCache, kernels: DecodeKernels) -> CooperativeStep:
    """Skips where the kernels, which are for Hopper, can't be made."""
    skip_unless_hopper()
    shape, weights = decode_shape(decoder.config), step_weights(decoder)
    if made_by == "one launch":
        plan = ops.plan_decode_step(shape, torch.bfloat16, CUDA)
        return ops.decode_step(shape, weights, kv, plan) if plan else pytest.skip("not for this model")
    plans = ops.plan_chain_step(shape, torch.bfloat16, CUDA)
    return ops.chain_step(shape, weights, kv, plans, kernels) if plans else pytest.skip("not for this model")


@pytest.mark.parametrize(
    ("num_rows", "made_by"),
    [
        *((rows, "pass") for rows in (1, 3, 16, 33, 64, 100)),
        *((rows, "one launch") for rows in (1, 3, 8)),
        *((rows, "chain") for rows in (9, 16, 17, 33, 64)),
    ],
)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@torch.inference_mode()
def test_logits_and_kv(architecture: str, heads: tuple[int, int, int], num_rows: int, made_by: str) -> None:
    config, parameters = model(architecture, heads)
    generator = torch.Generator().manual_seed(num_rows)
    positions = torch.randint(0, MAX_PAGES * PAGE_SIZE, (num_rows,), generator=generator)
    table = torch.randperm(num_rows * MAX_PAGES, generator=generator).view(num_rows, MAX_PAGES)
    write_index = table[torch.arange(num_rows), positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
    tokens = torch.randint(0, config.vocab_size, (num_rows,), generator=generator)
    slots = torch.randperm(num_rows, generator=generator)
    pages = torch.zeros((num_rows, MAX_PAGES), dtype=torch.int32)
    pages[slots] = table.to(torch.int32)
    mine = KVCache.allocate(config, num_rows * MAX_PAGES, PAGE_SIZE, torch.bfloat16, CUDA)
    theirs = KVCache.allocate(config, num_rows * MAX_PAGES, PAGE_SIZE, torch.float32, CPU)
    for ours, other in zip(mine.k + mine.v, theirs.k + theirs.v, strict=True):
        ours.normal_()
        other.copy_(ours)

    expected = Decoder(config, tensors(parameters, CPU, torch.float32)).forward(
        ForwardBatch(
            input_ids=tokens,
            positions=positions,
            write_index=write_index,
            query_lens=[1] * num_rows,
            kv_lens=(positions + 1).tolist(),
            page_table=table,
        ),
        theirs,
    )

    decoder = Decoder(config, tensors(parameters, CUDA, torch.bfloat16))
    kernels = ops.decode_kernels(decode_shape(config), torch.bfloat16, CUDA, num_rows)
    assert kernels is not None
    assert kernels.takes(num_rows) is (num_rows <= 64)
    cos, sin = decoder.rope.halves(2048, torch.bfloat16)
    last_token = torch.zeros(num_rows, dtype=torch.int64)
    last_token[slots[0]] = tokens[0]
    tokens[0] = -1
    sharing = ONE_EACH if made_by == "one launch" else MANY
    rows = DecodeRows(
        token=tokens.to(CUDA),
        slot=slots.to(CUDA),
        position=positions.to(CUDA),
        write_index=write_index.to(CUDA),
        last_token=last_token.to(CUDA),
        page_table=pages.to(CUDA),
        work=key_work(slots, positions + 1, config.num_kv_heads, sharing).to(CUDA),
        cos=cos,
        sin=sin,
    )
    forward = DecodePass(decoder, kernels).forward
    if made_by != "pass":
        step = cooperative_step(made_by, decoder, mine, kernels)
        forward = lambda rows, kv: step(rows)  # noqa: E731
    forward(rows, mine)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = forward(rows, mine)
    seen = []
    for _ in range(5):
        logits.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        seen.append(logits.clone())
    assert relative_error(seen[0], expected) < TOLERANCE
    assert all(torch.equal(seen[0], again) for again in seen[1:]), "the same step gives the same bits"
    for ours, other in zip(mine.k + mine.v, theirs.k + theirs.v, strict=True):
        assert relative_error(ours, other) < TOLERANCE


@torch.inference_mode()
def test_many_steps_of_full_width_give_the_same_bits() -> None:
    """Blocks that end early bring the next weights while others attend. Keys were overwritten while a load of
    them still waited behind stores to the busy memory: in one of some thousand launches."""
    num_rows, context = 64, 1024
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    config = parse_model_config({"architectures": ["LlamaForCausalLM"], **SHAPE, **sizes, **heads}, {})
    torch.manual_seed(3)
    decoder = Decoder(config, ParameterFactory(config, torch.bfloat16, CUDA).make())
    for slot in weight_slots(decoder.parameters, find_architecture(config).names, config).values():
        slot.normal_(1.0 if slot.dim() == 1 else 0.0, 0.02)
    num_pages = num_rows * context // PAGE_SIZE
    kv = KVCache.allocate(config, num_pages, PAGE_SIZE, torch.bfloat16, CUDA)
    for plane in kv.k + kv.v:
        plane.normal_()
    pages = torch.randperm(num_pages).view(num_rows, -1)
    slots, positions = torch.arange(num_rows), torch.full((num_rows,), context - 1)
    cos, sin = decoder.rope.halves(context, torch.bfloat16)
    rows = DecodeRows(
        token=torch.randint(0, config.vocab_size, (num_rows,)).to(CUDA),
        slot=slots.to(CUDA),
        position=positions.to(CUDA),
        write_index=(pages[:, -1] * PAGE_SIZE + PAGE_SIZE - 1).to(CUDA),
        last_token=torch.zeros(num_rows, dtype=torch.int64, device=CUDA),
        page_table=pages.to(torch.int32).to(CUDA),
        work=key_work(slots, positions + 1, config.num_kv_heads).to(CUDA),
        cos=cos,
        sin=sin,
    )
    kernels = ops.decode_kernels(decode_shape(config), torch.bfloat16, CUDA, num_rows)
    assert kernels is not None
    step = cooperative_step("chain", decoder, kv, kernels)
    first = step(rows).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step(rows)
    different = torch.zeros((), dtype=torch.int64, device=CUDA)
    for _ in range(3000):
        graph.replay()
        different += (logits != first).any()
    assert int(different) == 0
