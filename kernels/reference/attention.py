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
    row = max_copied_pages = 0
    for index, (query_len, kv_len) in enumerate(zip(query_lens, kv_lens, strict=True)):
        kv_start = max(0, kv_len - query_len - window + 1) if window else 0
        page_start, page_end = kv_start // page_size, -(-kv_len // page_size)
        pages = rows[index][page_start:page_end]
        first_page = pages[0] if _are_neighbours(pages) else -1
        if first_page < 0:
            max_copied_pages = max(max_copied_pages, len(pages))
        page_ids = page_table[index, page_start:page_end]
        skip = kv_start % page_size
        spans.append(SequenceSpan(row, query_len, kv_len - kv_start, skip, first_page, page_ids))
        row += query_len
    return AttentionPlan(spans, window, max_copied_pages, masks={})


def _are_neighbours(pages: list[int]) -> bool:
    first = pages[0]
    return pages[-1] - first == len(pages) - 1 and pages == list(range(first, first + len(pages)))


def paged_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k_pages.shape[2]
    # The heads that share a KV head are neighbours: one sequence's query is [H_kv, group, D] per token.
    grouped = q.view(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    copied = _scratch(k_pages, v_pages, plan.max_copied_pages)
    attended = []
    for span in plan.spans:
        keys, values = _heads_of(k_pages, span, copied[0]), _heads_of(v_pages, span, copied[1])
        queries = grouped[span.row : span.row + span.query_len]
        if span.query_len == 1:
            # One query sees every key: its heads are the rows of one small matrix per KV head.
            attended.append(scaled_dot_product_attention(queries, keys, values, scale=scale))
        else:
            attended.append(_attend_causally(queries, keys, values, span, plan, scale))
    together = attended[0] if len(attended) == 1 else torch.cat(attended)
    return together.view(num_tokens, num_heads, head_dim)


def _scratch(k_pages: Tensor, v_pages: Tensor, num_pages: int) -> tuple[Tensor, Tensor]:
    """Room for one sequence's K and V, used by one sequence after the other."""
    if num_pages == 0:
        return k_pages, v_pages  # nothing is copied
    shape = (num_pages, *k_pages.shape[1:])
    return k_pages.new_empty(shape), v_pages.new_empty(shape)


def _heads_of(pages: Tensor, span: SequenceSpan, scratch: Tensor) -> Tensor:
    """The span's tokens, `[1, H_kv, num_keys, D]`: a view where its pages are neighbours, else of a copy."""
    first_page, source = span.first_page, pages
    if first_page < 0:
        first_page, source = 0, scratch
        torch.index_select(pages, 0, span.page_ids, out=scratch[: len(span.page_ids)])
    _, page_size, num_kv_heads, head_dim = pages.shape
    token = num_kv_heads * head_dim
    offset = source.storage_offset() + (first_page * page_size + span.skip) * token
    size = (1, num_kv_heads, span.num_keys, head_dim)
    return source.as_strided(size, (span.num_keys * token, head_dim, token, 1), offset)


def _attend_causally(
    queries: Tensor, keys: Tensor, values: Tensor, span: SequenceSpan, plan: AttentionPlan, scale: float
) -> Tensor:
    """Attention of `[query_len, H_kv, group, D]` queries that stand at the last keys; the same shape."""
    starts_at_first_key = span.query_len == span.num_keys
    plain_causal = starts_at_first_key and not (plan.window and span.num_keys > plan.window)
    # Head by head in memory: the copies are small beside what the product saves.
    attended = scaled_dot_product_attention(
        queries.flatten(1, 2).transpose(0, 1).unsqueeze(0).contiguous(),
        keys.contiguous(),
        values.contiguous(),
        attn_mask=None if plain_causal else _mask(span, plan, queries),
        is_causal=plain_causal,
        scale=scale,
        enable_gqa=True,
    )
    return attended.squeeze(0).transpose(0, 1).contiguous().view(queries.shape)


def _mask(span: SequenceSpan, plan: AttentionPlan, queries: Tensor) -> Tensor:
    """0 where a query sees a key, else -inf: `[query_len, num_keys]`, of the queries' dtype."""
    mask = plan.masks.get(span.row)
    if mask is None:
        key_at = torch.arange(span.num_keys, device=queries.device)
        query_at = key_at[span.num_keys - span.query_len :].unsqueeze(1)
        hidden = key_at > query_at
        if plan.window:
            hidden |= key_at <= query_at - plan.window
        mask = torch.zeros(hidden.shape, dtype=queries.dtype, device=queries.device)
        plan.masks[span.row] = mask.masked_fill_(hidden, float("-inf"))
    return mask
