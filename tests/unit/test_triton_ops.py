"""The Triton kernels in Triton's interpreter, against the reference. CUDA runs them in `tests/gpu`."""

from __future__ import annotations

import pytest
import torch

from phloem.kernels.reference import activation, norm, pages, rope, sampling
from phloem.kernels.triton_ops import activation as triton_activation
from phloem.kernels.triton_ops import norm as triton_norm
from phloem.kernels.triton_ops import pages as triton_pages
from phloem.kernels.triton_ops import rope as triton_rope
from phloem.kernels.triton_ops import sampling as triton_sampling
from phloem.kernels.triton_ops.lane import TritonLane
from phloem.shared.engine.models.kv_cache import KVCache
from tests.support.device_ops import HEADS, Heads, paged_batch, relative_error

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels for real")

CPU = torch.device("cpu")


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("heads", HEADS)
def test_attention_agrees_with_the_reference(heads: Heads, page_size: int) -> None:
    batch = paged_batch(heads, page_size, query_lens=(1, 5, 33, 1), kv_lens=(1, 40, 33, 70))
    lane = TritonLane(CPU, window=0, max_rows=6, max_pages=80)
    out = torch.full_like(batch.q, float("nan"))
    plan = lane.plan(batch.query_lens, batch.kv_lens, batch.page_table.numpy())
    plan.attend(batch.q, batch.k_pages, batch.v_pages, heads.head_dim**-0.5, out)
    assert relative_error(out, batch.expected()) < 1e-5


def test_attention_sees_only_the_window() -> None:
    batch = paged_batch(Heads(8, 2, 64), 16, query_lens=(1, 20, 33), kv_lens=(90, 40, 33))
    lane = TritonLane(CPU, window=7, max_rows=4, max_pages=6)
    out = torch.full_like(batch.q, float("nan"))
    plan = lane.plan(batch.query_lens, batch.kv_lens, batch.page_table.numpy())
    plan.attend(batch.q, batch.k_pages, batch.v_pages, 64**-0.5, out)
    assert relative_error(out, batch.expected(window=7)) < 1e-5


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("joined", [True, False])
def test_rope_and_kv_write_agree_with_the_reference(heads: Heads, joined: bool) -> None:
    num_tokens, rotated = 5, heads.num_heads + heads.num_kv_heads
    qkv = torch.randn(num_tokens, rotated + heads.num_kv_heads, heads.head_dim)
    qk, v = qkv[:, :rotated], qkv[:, rotated:]
    if not joined:
        qk, v = qk.clone(), v.clone()
    half = torch.randn(num_tokens, 1, heads.head_dim // 2), torch.randn(num_tokens, 1, heads.head_dim // 2)
    cos, sin = torch.cat((half[0], half[0]), -1), torch.cat((-half[1], half[1]), -1)
    write_index = torch.randperm(32)[:num_tokens]
    caches = [torch.zeros(8, 4, heads.num_kv_heads, heads.head_dim) for _ in range(4)]
    expected = rope.rope_write_kv(qk, v, cos, sin, caches[0], caches[1], write_index)
    out = triton_rope.rope_write_kv(qk, v, cos, sin, caches[2], caches[3], write_index)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(caches[2], caches[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(caches[3], caches[1], rtol=0, atol=0)


@pytest.mark.parametrize("width", [96, 576, 2048])
def test_norms_and_activation_agree_with_the_reference(width: int) -> None:
    x, residual, weight = torch.randn(7, width), torch.randn(7, width), torch.randn(width)
    torch.testing.assert_close(triton_norm.rms_norm(x, weight, 1e-5), norm.rms_norm(x, weight, 1e-5))
    heads = torch.randn(4, 6, width)[:, :3]
    torch.testing.assert_close(triton_norm.rms_norm(heads, weight, 1e-5), norm.rms_norm(heads, weight, 1e-5))
    sums = residual.clone(), residual.clone()
    expected = norm.add_rms_norm(x, sums[0], weight, 1e-5)
    torch.testing.assert_close(triton_norm.add_rms_norm(x, sums[1], weight, 1e-5), expected)
    torch.testing.assert_close(sums[1], sums[0])
    gate_up = torch.randn(7, 2 * width)
    torch.testing.assert_close(triton_activation.silu_mul(gate_up), activation.silu_mul(gate_up))


@pytest.mark.parametrize(("layer_start", "layer_end"), [(0, 3), (1, 2), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pages_move_with_the_references_digest(layer_start: int, layer_end: int, dtype: torch.dtype) -> None:
    shape = (9, 4, 2, 64)
    source = KVCache(
        [torch.randn(shape).to(dtype) for _ in range(3)], [torch.randn(shape).to(dtype) for _ in range(3)]
    )
    target = KVCache(
        [torch.zeros(shape, dtype=dtype) for _ in range(3)],
        [torch.zeros(shape, dtype=dtype) for _ in range(3)],
    )
    page_ids = torch.tensor([5, 1, 3])
    size = (layer_end - layer_start) * 2 * 3 * source.k[0][0].numel() * dtype.itemsize
    staged = [torch.zeros(size + 5, dtype=torch.uint8) for _ in range(2)]
    expected = pages.gather_pages(source, page_ids, layer_start, layer_end, staged[0])
    assert int(triton_pages.gather_pages(source, page_ids, layer_start, layer_end, staged[1])) == expected
    assert torch.equal(staged[0], staged[1])
    assert int(triton_pages.scatter_pages(target, page_ids, layer_start, layer_end, staged[1])) == expected
    for layer in range(layer_start, layer_end):
        assert torch.equal(target.k[layer][page_ids], source.k[layer][page_ids])
        assert torch.equal(target.v[layer][page_ids], source.v[layer][page_ids])
        assert not target.k[layer][[0, 2, 4, 6, 7, 8]].any()


def test_sampled_tokens_are_the_references() -> None:
    rows, vocab = 6, 5000
    logits = torch.randn(rows, vocab) * 3
    temperature = torch.tensor([0.0, 1.0, 0.7, 2.0, 1.0, 0.3])
    top_k = torch.tensor([0, 5, 0, 0, 50, 0])
    top_p = torch.tensor([1.0, 1.0, 0.5, 1.0, 0.9, 1.0])
    min_p = torch.tensor([0.0, 0.0, 0.0, 0.05, 0.01, 0.0])
    seed = torch.randint(-(2**62), 2**62, (rows,))
    for step in range(10):
        position = torch.arange(rows) + 7 * step
        filters = (logits, temperature, top_k, top_p, min_p, seed, position)
        out = triton_sampling.sample(*filters, all_greedy=False, no_filters=False)
        assert torch.equal(out, sampling.sample(*filters))
    plain = (logits, temperature, top_k * 0, top_p * 0 + 1, min_p * 0, seed, torch.arange(rows))
    out = triton_sampling.sample(*plain, all_greedy=False, no_filters=True)
    assert torch.equal(out, sampling.sample(*plain))


def test_greedy_takes_the_first_of_equal_tokens() -> None:
    logits = torch.zeros(3, 5000)
    logits[1, 4321] = logits[1, 77] = 2.0
    zeros, ids = torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    out = triton_sampling.sample(logits, zeros, ids, zeros, zeros, ids, ids, all_greedy=True, no_filters=True)
    assert out.tolist() == [0, 77, 0]


def test_bitmask_forbids_exactly_the_zero_bits() -> None:
    logits = torch.randn(5, 5000)
    mask = torch.randint(-(2**31), 2**31 - 1, (2, 157), dtype=torch.int32)
    bits = ((mask[:, :, None] >> torch.arange(32)) & 1).reshape(2, -1)[:, :5000].bool()
    expected = logits.clone()
    expected[4][~bits[0]] = expected[1][~bits[1]] = float("-inf")
    triton_sampling.apply_bitmask(logits, mask, torch.tensor([4, 1]))
    assert torch.equal(logits, expected)
