"""Every op on CUDA against the reference on the CPU: all backends, over dtypes, shapes, page sizes and heads.

Tolerances are `tolerance`'s in tests/support/device_ops.py: 1e-4 in float32, 5e-3 in bfloat16, 1e-3 in
float16, relative to the norm of the result; ids, bytes and digests are equal.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from torch import Tensor

from phloem.kernels import ops
from phloem.kernels.triton_ops.lane import TritonLane
from phloem.kernels.triton_ops.sampling import apply_bitmask
from phloem.kernels.types import LinearWeight
from phloem.shared.engine.gpu_facts import find_nvcc
from tests.support.device_ops import HEADS, Heads, PagedBatch, relative_error, tolerance
from tests.support.op_checks import (
    LayerOps,
    check_activation,
    check_attention,
    check_norm_of_some_heads,
    check_norms,
    check_pages,
    check_rope,
)

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda:0")
OPS = LayerOps(
    ops.rms_norm, ops.add_rms_norm, ops.act_mul, ops.rope_write_kv, ops.gather_pages, ops.scatter_pages
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Each is a kernel of its own to compile: page sizes are crossed with bfloat16 alone.
ATTENTION_SHAPES = [
    *((torch.bfloat16, page_size) for page_size in (1, 16, 64)),
    (torch.float32, 16),
    (torch.float16, 16),
]


def skip_unless_flashinfer_has(backend: str, dtype: torch.dtype, head_dim: int) -> None:
    """With the reason; it would compile for minutes what nobody has compiled yet."""
    if dtype == torch.float32:
        pytest.skip("FlashInfer has no float32 kernels")
    if importlib.util.find_spec("flashinfer") is None:
        pytest.skip("flashinfer-python is not installed: make test-gpu does it (pip install phloem[gpu])")
    if backend == "fa3" and torch.cuda.get_device_capability(CUDA)[0] != 9:
        pytest.skip("FA3 is for Hopper")
    from phloem.kernels.flashinfer_ops.availability import missing_kernels

    if missing_kernels(dtype, head_dim, hopper=backend == "fa3"):
        how = "would compile for minutes" if find_nvcc() else "has no nvcc to compile"
        pytest.skip(f"FlashInfer {how} {dtype}, head_dim {head_dim}: install flashinfer-jit-cache 0.6.14")


def attend(batch: PagedBatch, backend: str, heads: Heads, window: int = 0) -> Tensor:
    out = torch.full_like(batch.q, float("nan"))
    scale = heads.head_dim**-0.5
    if backend == "triton":
        width = batch.page_table.shape[1]
        lane = TritonLane(CUDA, window=window, max_rows=8, max_pages=width)
        plan = lane.plan(batch.query_lens, batch.kv_lens, batch.page_table.numpy())
        plan.attend(batch.q, batch.k_pages, batch.v_pages, scale, out)
        return out
    # FlashInfer is installed only where there is a GPU.
    from phloem.kernels.flashinfer_ops.attention import (
        FLOAT_WORKSPACE_BYTES,
        AttentionShape,
        FlashInferLane,
    )
    from phloem.kernels.flashinfer_ops.page_lists import PagedRows

    lane_of = FlashInferLane(
        AttentionShape(*heads, batch.k_pages.shape[1], batch.q.dtype),
        CUDA,
        torch.zeros(FLOAT_WORKSPACE_BYTES, dtype=torch.uint8, device=CUDA),
        backend="fa3" if backend == "fa3" else "fa2",
        max_rows=8,
        max_indices=4096,
    )
    slots = np.arange(len(batch.kv_lens))
    rows = PagedRows(batch.page_table.numpy(), slots, batch.query_lens, batch.kv_lens)
    lane_of.plan(rows, in_graph=False).attend(batch.q, batch.k_pages, batch.v_pages, scale, out)
    return out


@pytest.mark.parametrize(("dtype", "page_size"), ATTENTION_SHAPES)
@pytest.mark.parametrize("backend", ["fa2", "fa3", "triton"])
@pytest.mark.parametrize("heads", HEADS)
def test_attention_agrees_with_the_reference(
    heads: Heads, page_size: int, backend: str, dtype: torch.dtype
) -> None:
    if backend != "triton":
        skip_unless_flashinfer_has(backend, dtype, heads.head_dim)
    check_attention(
        lambda batch: attend(batch, backend, heads),
        heads,
        page_size,
        dtype,
        CUDA,
        query_lens=(1, 1, 5, 300, 1),
        kv_lens=(1, 700, 40, 300, 70),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_sees_only_the_window(dtype: torch.dtype) -> None:
    heads = Heads(8, 2, 128)
    check_attention(
        lambda batch: attend(batch, "triton", heads, window=33),
        heads,
        16,
        dtype,
        CUDA,
        query_lens=(1, 1, 200, 20),
        kv_lens=(900, 5, 300, 20),
        window=33,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 576), (33, 4096), (257, 3584), (5, 96)])
def test_norms_and_activation_agree_with_the_reference(rows: int, width: int, dtype: torch.dtype) -> None:
    check_norms(OPS, dtype, CUDA, rows, width)
    check_activation(OPS, dtype, CUDA, rows, width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_norm_of_heads_agrees_with_the_reference(heads: Heads, dtype: torch.dtype) -> None:
    check_norm_of_some_heads(OPS, dtype, CUDA, heads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("heads", HEADS)
def test_rope_and_kv_write_agree_with_the_reference(
    heads: Heads, page_size: int, joined: bool, dtype: torch.dtype
) -> None:
    check_rope(OPS, dtype, CUDA, heads, page_size, joined=joined)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layers", [(0, 3), (1, 2), (2, 2)])
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("heads", [Heads(8, 8, 128), Heads(9, 3, 64), Heads(8, 1, 256)])
def test_pages_move_with_the_references_digest(
    heads: Heads, page_size: int, layers: tuple[int, int], dtype: torch.dtype
) -> None:
    check_pages(OPS, dtype, CUDA, heads, page_size, layers=layers)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 16, 300])
def test_linear_agrees_with_the_reference(num_tokens: int, bias: bool, dtype: torch.dtype) -> None:
    x, weight, offsets = (torch.randn(shape).to(dtype) for shape in ((num_tokens, 576), (1000, 576), (1000,)))
    expected = x.double() @ weight.double().T + (offsets.double() if bias else 0)
    prepared = ops.prepare_linear(LinearWeight(weight.to(CUDA), offsets.to(CUDA) if bias else None))
    assert relative_error(ops.linear(x.to(CUDA), prepared), expected) < tolerance(dtype, CUDA)


@pytest.mark.parametrize("filters", [False, True])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 49_152), (64, 128_256), (7, 151_936), (256, 1000)])
def test_sampled_tokens_are_those_of_the_cpu(rows: int, vocab: int, filters: bool) -> None:
    temperature = torch.rand(rows) + 0.2
    temperature[::3] = 0.0  # greedy
    top_k, top_p, min_p = torch.zeros(rows, dtype=torch.int64), torch.ones(rows), torch.zeros(rows)
    if filters:
        top_k[1::3], top_p[::2], min_p[::5] = 50, 0.9, 0.02
        top_k[4::9], top_k[7::9] = vocab - 1, 300  # more than there are blocks, with a nucleus and without
    seed, position = torch.randint(-(2**62), 2**62, (rows,)), torch.arange(rows)
    drawn = (torch.randn(rows, vocab) * 3, temperature, top_k, top_p, min_p, seed, position)
    expected = ops.sample(*drawn)
    hints = ops.SamplingHints(all_greedy=False, no_filters=not filters)
    logits, temperature, top_k, top_p, min_p, seed, position = (tensor.to(CUDA) for tensor in drawn)
    out = ops.sample(logits, temperature, top_k, top_p, min_p, seed, position, hints)
    assert torch.equal(out.cpu(), expected)


def test_the_last_of_a_nucleus_stays_in_it() -> None:
    """Its score is found twice, for the threshold and by the kernel that draws: both must round alike."""
    rows, draws = 4096, 64
    logits, temperature = torch.randn(rows, 512, device=CUDA) * 0.1, torch.rand(rows, device=CUDA) + 0.3
    second = logits.topk(2).indices[:, 1]  # sampled in every third draw at least
    ones, position = torch.ones(rows, device=CUDA), torch.zeros(rows, dtype=torch.int64, device=CUDA)
    seen = torch.zeros(rows, dtype=torch.bool, device=CUDA)
    for seed in range(draws):
        out = ops.sample(logits, temperature, position + 2, ones, ones * 0, position + seed, position)
        seen |= out == second
    assert seen.all()


def test_greedy_takes_the_first_of_equal_tokens() -> None:
    logits = torch.zeros(3, 128_256, device=CUDA)
    logits[1, 100_321] = logits[1, 77] = 2.0
    zeros, ids = torch.zeros(3, device=CUDA), torch.zeros(3, dtype=torch.int64, device=CUDA)
    hints = ops.SamplingHints(all_greedy=True, no_filters=True)
    assert ops.sample(logits, zeros, ids, zeros, zeros, ids, ids, hints).tolist() == [0, 77, 0]


def test_bitmask_forbids_exactly_the_zero_bits() -> None:
    logits = torch.randn(5, 128_256)
    mask = torch.randint(-(2**31), 2**31 - 1, (2, 4008), dtype=torch.int32)
    bits = ((mask[:, :, None] >> torch.arange(32)) & 1).reshape(2, -1)[:, :128_256].bool()
    expected = logits.clone()
    expected[4][~bits[0]] = expected[1][~bits[1]] = float("-inf")
    out = logits.to(CUDA)
    apply_bitmask(out, mask.to(CUDA), torch.tensor([4, 1], device=CUDA))
    assert torch.equal(out.cpu(), expected)
