"""What the GPU engine is held to, for the shape of Llama-3.1-8B in bfloat16 on one H100 or H200. Pure.

The bars are those of the project's issue 3; a figure that a run did not measure is not judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from phloem.shared.bench.bars import Bar, all_met


class Figures(Protocol):
    """One row of the instrument: `bench.Measurement`."""

    @property
    def kind(self) -> str: ...
    @property
    def batch(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def ratio(self) -> float: ...
    @property
    def host_ms(self) -> float: ...
    @property
    def idle_percent(self) -> float | None: ...


class Limit(NamedTuple):
    """At most `limit` of `figure` for the row of (kind, batch, tokens); tokens 0: any."""

    what: str
    kind: str
    batch: int
    tokens: int
    figure: Callable[[Figures], float | None]
    limit: float
    unit: str


def _ratio(row: Figures) -> float:
    return row.ratio


def _idle(row: Figures) -> float | None:
    return row.idle_percent


def _host(row: Figures) -> float | None:
    return row.host_ms or None


LIMITS = (
    Limit("decode, batch 1, context 1k", "decode", 1, 1024, _ratio, 1.10, "x floor"),
    Limit("decode, batch 64, context 1k", "decode", 64, 1024, _ratio, 1.15, "x floor"),
    Limit("decode, batch 256, context 2k", "decode", 256, 2048, _ratio, 1.20, "x floor"),
    Limit("prefill, 8,192 tokens", "prefill", 1, 8192, _ratio, 1.45, "x floor"),
    Limit("prefill, 512 tokens", "prefill", 1, 512, _ratio, 2.0, "x floor"),
    Limit("idle device between decode steps, batch 64", "decode", 64, 0, _idle, 2.0, "%"),
    Limit("the same, grammar masks on half of the rows", "decode, grammars", 64, 0, _idle, 5.0, "%"),
    Limit("idle device between decode steps, batch 64, sampled", "decode, sampled", 64, 0, _idle, 2.0, "%"),
    Limit("host's work per decode step, batch 256", "decode", 256, 0, _host, 1.5, "ms"),
)
START_LIMIT_S = 40.0
# The shape that the bars are about: layers, hidden size, KV heads, head_dim, vocabulary.
SHAPE = (32, 4096, 8, 128, 128_256)


def bars_of(rows: Sequence[Figures], start_s: float) -> list[Bar]:
    """One for each of `LIMITS`, in their order, then the start; the worst where several rows match, no number
    where none does."""
    bars = [Bar(limit.what, _worst(limit, rows), limit.unit, limit.limit) for limit in LIMITS]
    return [*bars, Bar("start to ready, kernels compiled before", start_s, "s", START_LIMIT_S)]


def _worst(limit: Limit, rows: Sequence[Figures]) -> float:
    values = [
        value
        for row in rows
        if (row.kind, row.batch) == (limit.kind, limit.batch) and limit.tokens in (0, row.tokens)
        if (value := limit.figure(row)) is not None
    ]
    return max(values, default=math.nan)


def measured_met(bars: Sequence[Bar]) -> bool:
    """Whether no bar that was measured is missed, and one was."""
    measured = [bar for bar in bars if bar.is_measured]
    return bool(measured) and all_met(measured)


def why_not_judged(shape: tuple[int, ...], dtype: str, device: str) -> str | None:
    """Why the bars say nothing about this run, or None."""
    if shape != SHAPE:
        return "the bars are for the shape of Llama-3.1-8B (benchmarks/models/llama-3.1-8b)"
    if dtype != "torch.bfloat16":
        return f"the bars are for bfloat16, this run was {dtype}"
    if not any(name in device for name in ("H100", "H200")):
        return f"the bars are for an H100 or H200, this run was on {device}"
    return None
