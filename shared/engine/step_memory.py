"""How much memory the largest step takes, and which smaller one would fit: pure, in bytes, "about"."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from phloem.shared.model_store.model_config import ModelConfig

LEAST_CHUNK = 64  # tokens: no advice asks for smaller chunks
# FlashInfer's buffer (384 MiB), and room for cuBLAS's, for the kernels themselves and for graphs' nodes.
WORKSPACE_BYTES = 640 * 2**20

# Rows are sampled from float32 logits; all graphs share one pool, in which some room is lost.
_FLOAT32_BYTES = 4
_GRAPH_POOL = 2
# What a row's filters take (`triton_ops/thresholds.py`): eight histograms of 2,048 sums, and some words.
_FILTER_BYTES = 8 * 2048 * 8 + 4096


class StepSizes(NamedTuple):
    """What decides how much memory a step takes: the flags, after their defaults."""

    chunk_tokens: int
    running: int
    graph_rows: int  # 0: no graphs


class StepCost(NamedTuple):
    """Bytes of a step's activations for each token, for each row that is sampled with every filter, and for
    each row of a captured step: the largest tensors that live at the same time."""

    per_token: int
    per_row: int
    per_graph_row: int

    def of(self, sizes: StepSizes) -> int:
        """Of the largest step."""
        return sizes.chunk_tokens * self.per_token + sizes.running * self.per_row


def step_cost(config: ModelConfig, itemsize: int) -> StepCost:
    """Of a model whose activations have `itemsize` bytes each."""
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    per_token = (3 * config.intermediate_size + 4 * config.hidden_size + heads) * itemsize
    per_graph_row = _GRAPH_POOL * config.vocab_size * (itemsize + _FLOAT32_BYTES)
    per_row = config.vocab_size * (itemsize + _FLOAT32_BYTES) + _FILTER_BYTES
    return StepCost(per_token, per_row, per_token + per_graph_row)


def rehearsal_pages(sizes: StepSizes, page_size: int, context_length: int) -> int:
    """Pages that the largest step writes: a chunk, and one for each request."""
    tokens = min(sizes.chunk_tokens, context_length)
    return max(-(-tokens // page_size), sizes.running)


def smaller_step(sizes: StepSizes, cost: StepCost, fits: Callable[[StepSizes], bool]) -> StepSizes | None:
    """The first that fits when the chunk or the number of requests, whichever takes more, is halved again and
    again; None where not even the smallest does."""
    while (halved := _halved(sizes, cost)) is not None:
        sizes = halved
        if fits(sizes):
            return sizes
    return None


def smallest_step(sizes: StepSizes) -> StepSizes:
    """The least that an advice asks for."""
    return StepSizes(min(LEAST_CHUNK, sizes.chunk_tokens), 1, min(1, sizes.graph_rows))


def _halved(sizes: StepSizes, cost: StepCost) -> StepSizes | None:
    tokens, rows = sizes.chunk_tokens, sizes.running
    for_tokens = tokens * cost.per_token if tokens > LEAST_CHUNK else 0
    for_rows = rows * cost.per_row if rows > 1 else 0
    if not for_tokens and not for_rows:
        return None
    if for_tokens >= for_rows:
        return sizes._replace(chunk_tokens=max(LEAST_CHUNK, tokens // 2))
    return sizes._replace(running=rows // 2, graph_rows=min(sizes.graph_rows, rows // 2))


def fewer_graph_rows(sizes: StepSizes, fits: Callable[[int], bool]) -> int | None:
    """The largest of half, a quarter, ... of the graphs' rows that fits, or None."""
    rows = sizes.graph_rows // 2
    while rows and not fits(rows):
        rows //= 2
    return rows or None


def lowered(before: StepSizes, after: StepSizes, *, to_one_peer: bool = False) -> str:
    """As the flags that make it so: "--chunked-prefill-size to 2048 and --max-running-requests to 64"."""
    flags = []
    if after.chunk_tokens < before.chunk_tokens:
        flags.append(f"--chunked-prefill-size to {after.chunk_tokens}")
    if after.running < before.running:
        flags.append(f"--max-running-requests to {after.running}")
    if to_one_peer:
        flags.append("--transfer-peers to 1")
    return " and ".join(flags)


def as_flags(sizes: StepSizes) -> str:
    """With one peer: "--chunked-prefill-size 64 --max-running-requests 1 --transfer-peers 1"."""
    tokens, rows = sizes.chunk_tokens, sizes.running
    return f"--chunked-prefill-size {tokens} --max-running-requests {rows} --transfer-peers 1"
