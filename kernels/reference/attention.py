"""Causal attention of a ragged batch over paged K and V."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from phloem.kernels.types import AttentionPlan, SequenceSpan


def plan_attention(
    query_lens: Sequence[int], kv_lens: Sequence[int], page_table: Tensor, page_size: int, window: int
) -> AttentionPlan:
    rows: list[list[int]] = page_table.tolist()
    spans = []
    row = 0
    for index, (query_len, kv_len) in enumerate(zip(query_lens, kv_lens, strict=True)):
        kv_start = max(0, kv_len - query_len - window + 1) if window else 0
        page_start, page_end = kv_start // page_size, -(-kv_len // page_size)
        pages = rows[index][page_start:page_end]
        spans.append(
            SequenceSpan(
                row=row,
                query_len=query_len,
                num_keys=kv_len - kv_start,
                skip=kv_start % page_size,
                first_page=pages[0] if _are_neighbours(pages) else -1,
                num_pages=len(pages),
                page_ids=page_table[index, page_start:page_end],
            )
        )
        row += query_len
    return AttentionPlan(spans, window, page_size)


def _are_neighbours(pages: list[int]) -> bool:
    first = pages[0]
    return pages[-1] - first == len(pages) - 1 and pages == list(range(first, first + len(pages)))


def paged_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for span in plan.spans:
        rows = slice(span.row, span.row + span.query_len)
        out[rows] = _attend(q[rows], _tokens(k_pages, span), _tokens(v_pages, span), plan.window, scale)
    return out


def _tokens(pages: Tensor, span: SequenceSpan) -> Tensor:
    """The span's tokens, `[num_keys, num_kv_heads, head_dim]`: a view where its pages are neighbours."""
    if span.first_page >= 0:
        chosen = pages[span.first_page : span.first_page + span.num_pages]
    else:
        chosen = pages.index_select(0, span.page_ids)
    return chosen.view(-1, *pages.shape[2:])[span.skip : span.skip + span.num_keys]


def _attend(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    query_len, num_heads, head_dim = q.shape
    num_keys, num_kv_heads, _ = k.shape
    keys, values = k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0)
    if query_len == 1:
        # One query sees every key: the heads that share a KV head become the rows of one small matrix.
        queries = q.reshape(1, num_kv_heads, num_heads // num_kv_heads, head_dim)
        attended = scaled_dot_product_attention(queries, keys, values, scale=scale)
        return attended.reshape(1, num_heads, head_dim)
    queries = q.transpose(0, 1).unsqueeze(0)
    plain_causal = query_len == num_keys and not (window and num_keys > window)
    mask = None if plain_causal else _mask(query_len, num_keys, window, q.device)
    attended = scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=plain_causal, scale=scale, enable_gqa=True
    )
    return attended.squeeze(0).transpose(0, 1)


def _mask(query_len: int, num_keys: int, window: int, device: torch.device) -> Tensor:
    """Which keys each query sees: bool `[query_len, num_keys]`; the last query stands at the last key."""
    distance = torch.arange(num_keys - query_len, num_keys, device=device).unsqueeze(1) - torch.arange(
        num_keys, device=device
    )
    visible = distance >= 0
    return visible & (distance < window) if window else visible
