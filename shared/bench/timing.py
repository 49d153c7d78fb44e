"""The times of one successful request, by the definitions of SGLang's bench_serving."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import msgspec

from phloem.shared.bench.record import RequestRecord


class RequestTiming(msgspec.Struct, frozen=True):
    """Seconds.

    - `ttft_s`: from the start of sending to the first chunk with output.
    - `chunk_itl_s`: the gaps between chunks with output (SGLang's ITL over the OpenAI APIs).
    - `itl_s`: each gap divided by the tokens of the chunk that ends it, once for each of those tokens
      (SGLang's ITL over /generate). None when it isn't known how many tokens a chunk had.
    - `tpot_s`: (e2e - ttft) / (output tokens - 1). None with fewer than two tokens, or an unknown number.
    - `first_gap_s`: from token 0 to token 1. None when both came in one chunk or there is no token 1.
    """

    ttft_s: float
    e2e_s: float
    chunk_itl_s: Sequence[float]
    itl_s: Sequence[float] | None
    tpot_s: float | None
    first_gap_s: float | None


def timing_of(record: RequestRecord) -> RequestTiming:
    """The times of a request that succeeded. A failed one has no latency: asking for it is a bug."""
    assert record.succeeded, "a failed request has no latency"
    offsets = record.offsets()
    gaps = [later - earlier for earlier, later in itertools.pairwise(offsets)]
    counts = chunk_token_counts(record)
    return RequestTiming(
        ttft_s=offsets[0],
        e2e_s=record.e2e_s,
        chunk_itl_s=gaps,
        itl_s=None if counts is None else _per_token(gaps, counts[1:]),
        tpot_s=_tpot(record),
        first_gap_s=gaps[0] if gaps and (counts is None or counts[0] == 1) else None,
    )


def chunk_token_counts(record: RequestRecord) -> Sequence[int] | None:
    """Tokens of each chunk: what the server said with each; or one each, when their number is the number of
    all tokens (perhaps without an end token, which has no text); else None."""
    counts = record.tokens()
    if counts:
        return counts
    num_chunks = len(record.offsets())
    ended = record.finish_reason == "stop"
    if num_chunks == record.output_tokens or (ended and num_chunks + 1 == record.output_tokens):
        return [1] * num_chunks
    return None


def _per_token(gaps: Sequence[float], counts: Sequence[int]) -> list[float]:
    per_token: list[float] = []
    for gap, count in zip(gaps, counts, strict=True):
        if count == 1:
            per_token.append(gap)
        elif count:
            per_token.extend([gap / count] * count)
    return per_token


def _tpot(record: RequestRecord) -> float | None:
    if record.output_tokens < 2:
        return None
    return (record.e2e_s - record.ttft_s) / (record.output_tokens - 1)
