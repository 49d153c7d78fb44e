"""Every op on CUDA against the reference on the CPU; attention by all three backends, in bfloat16."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from phloem.kernels import ops
from phloem.kernels.reference import activation, norm
from phloem.kernels.triton_ops.lane import TritonLane
from tests.support.device_ops import HEADS, Heads, PagedBatch, paged_batch, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda:0")
TOLERANCE = 5e-3  # relative, bfloat16 operands
COMPILED_HEAD_DIMS = (64, 128)  # FlashInfer's ahead-of-time kernels


def attend(batch: PagedBatch, backend: str, heads: Heads) -> torch.Tensor:
    out = torch.full_like(batch.q, float("nan"))
    scale = heads.head_dim**-0.5
    if backend == "triton":
        width = batch.page_table.shape[1]
        lane = TritonLane(CUDA, window=0, max_rows=8, max_pages=width)
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

    page_size = batch.k_pages.shape[1]
    lane_of = FlashInferLane(
        AttentionShape(*heads, page_size, torch.bfloat16),
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


@pytest.mark.parametrize("backend", ["fa2", "fa3", "triton"])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("heads", HEADS)
def test_attention_agrees_with_the_reference(heads: Heads, page_size: int, backend: str) -> None:
    if backend != "triton" and heads.head_dim not in COMPILED_HEAD_DIMS:
        pytest.skip("FlashInfer would compile this head size for minutes")
    batch = paged_batch(heads, page_size, query_lens=(1, 1, 5, 300, 1), kv_lens=(1, 700, 40, 300, 70))
    batch = batch.to(CUDA, torch.bfloat16)
    assert relative_error(attend(batch, backend, heads), batch.expected()) < TOLERANCE


def test_norms_and_activation_agree_with_the_reference() -> None:
    x, residual = torch.randn(2, 33, 4096).to(torch.bfloat16)
    weight, gate_up = torch.randn(4096).to(torch.bfloat16), torch.randn(33, 8192).to(torch.bfloat16)
    sums = residual.clone(), residual.to(CUDA)
    expected = norm.add_rms_norm(x.clone(), sums[0], weight, 1e-5)
    out = ops.add_rms_norm(x.to(CUDA), sums[1], weight.to(CUDA), 1e-5)
    assert relative_error(out, expected) < TOLERANCE
    assert relative_error(sums[1], sums[0]) < TOLERANCE
    assert (
        relative_error(ops.rms_norm(x.to(CUDA), weight.to(CUDA), 1e-5), norm.rms_norm(x, weight, 1e-5))
        < TOLERANCE
    )
    assert relative_error(ops.silu_mul(gate_up.to(CUDA)), activation.silu_mul(gate_up)) < TOLERANCE


def test_sampled_tokens_are_those_of_the_cpu() -> None:
    rows, vocab = 64, 128_256
    temperature = torch.rand(rows)
    temperature[::3] = 0.0
    logits = torch.randn(rows, vocab) * 3
    parameters = (
        temperature,
        torch.zeros(rows, dtype=torch.int64),
        torch.ones(rows),
        torch.zeros(rows),
        torch.randint(-(2**62), 2**62, (rows,)),
        torch.arange(rows),
    )
    expected = ops.sample(logits, *parameters)
    heat, top_k, top_p, min_p, seed, position = (parameter.to(CUDA) for parameter in parameters)
    out = ops.sample(logits.to(CUDA), heat, top_k, top_p, min_p, seed, position)
    assert torch.equal(out.cpu(), expected)
