"""The numbers of a run of one target, named and defined as SGLang's bench_serving does."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from phloem.shared.bench.record import RequestRecord
from phloem.shared.bench.slo import Objective, is_good
from phloem.shared.bench.statistics import Summary, quantile, summarize
from phloem.shared.bench.timing import RequestTiming, timing_of

STALL_FACTOR = 5.0
LATENCIES = ("ttft", "itl", "chunk_itl", "tpot", "e2e_latency", "first_gap")
_STATS = ("mean", "median", "std", "p90", "p95", "p99", "max")


class Stalls(msgspec.Struct, frozen=True):
    """Gaps between chunks of over five times the run's median gap."""

    count: int
    share: float  # of all gaps
    requests: int  # that had one
    threshold_ms: float
    worst_ms: float
    total_s: float


class Goodput(msgspec.Struct, frozen=True):
    """Requests that kept every objective; a failed request is not good."""

    good: int
    share: float  # of all requests, failed ones among them
    requests_per_s: float
    tokens_per_s: float


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """`latencies` (milliseconds) are of successful requests, and are empty when they are withheld.

    A throughput or count that needs token counts is None when neither server nor tokenizer gave them.
    `withheld` says why there are no latencies, "" when there are. `concurrency` is the sum of all end-to-end
    latencies by the duration.
    """

    completed: int
    failed: int
    duration_s: float
    total_input_tokens: int | None
    total_output_tokens: int | None
    total_output_tokens_retokenized: int | None
    request_throughput: float
    input_throughput: float | None
    output_throughput: float | None
    total_throughput: float | None
    concurrency: float | None
    peak_concurrency: int
    total_cached_tokens: int | None
    cached_share: float | None
    resent: int
    short_outputs: int  # answers with fewer tokens than asked for
    latencies: dict[str, Summary]
    stalls: Stalls | None
    goodput: Goodput | None
    withheld: str = ""

    def flat(self) -> dict[str, float | int | str | None]:
        """The names of SGLang's JSON (`mean_ttft_ms`, ...), and ours beside them."""
        flat: dict[str, float | int | str | None] = {}
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if isinstance(value, Stalls | Goodput):
                flat |= {f"{name}_{field}": getattr(value, field) for field in value.__struct_fields__}
            elif name != "latencies":
                flat["duration" if name == "duration_s" else name] = value
        for metric, summary in self.latencies.items():
            flat |= {f"{stat}_{metric}_ms": getattr(summary, stat) for stat in _STATS}
        return flat


def compute_figures(
    records: Sequence[RequestRecord],
    duration_s: float,
    *,
    objectives: Sequence[Objective] = (),
    allowed_failures: float = 0.0,
    retokenized: int | None = None,
) -> Figures:
    """The figures of `records` (of one target, without warm-up), whose blocks took `duration_s` in all.

    With a larger share of failures than `allowed_failures` there are no latencies: those of the survivors
    would flatter a server that fails under load. `retokenized` is the number of output tokens that a
    tokenizer found in the answers.
    """
    good = [record for record in records if record.succeeded]
    timings = [timing_of(record) for record in good]
    num_failed = len(records) - len(good)
    withheld = _why_withheld(len(records), num_failed, allowed_failures)
    num_input = _total([_input_tokens(record) for record in good])
    num_output = _total([record.output_tokens for record in good])
    num_cached = _total([record.cached_tokens for record in good])
    total = None if num_input is None or num_output is None else num_input + num_output
    return Figures(
        completed=len(good),
        failed=num_failed,
        duration_s=duration_s,
        total_input_tokens=num_input,
        total_output_tokens=num_output,
        total_output_tokens_retokenized=retokenized,
        request_throughput=len(good) / duration_s,
        input_throughput=_rate(num_input, duration_s),
        output_throughput=_rate(num_output, duration_s),
        total_throughput=_rate(total, duration_s),
        concurrency=None if withheld else sum(timing.e2e_s for timing in timings) / duration_s,
        peak_concurrency=peak_concurrency(records),
        total_cached_tokens=num_cached,
        cached_share=num_cached / num_input if num_cached is not None and num_input else None,
        resent=sum(record.resent for record in records),
        short_outputs=sum(0 <= record.output_tokens < record.max_tokens for record in good),
        latencies={} if withheld else latency_summaries(timings),
        stalls=None if withheld else _stalls(timings),
        goodput=_goodput(records, good, timings, objectives, duration_s) if objectives else None,
        withheld=withheld,
    )


def latency_values(timings: Sequence[RequestTiming]) -> dict[str, list[float]]:
    """All values of each latency, in milliseconds; one that some request lacks the counts for is left out."""
    values = {
        "ttft": [timing.ttft_s * 1e3 for timing in timings],
        "chunk_itl": [gap * 1e3 for timing in timings for gap in timing.chunk_itl_s],
        "tpot": [timing.tpot_s * 1e3 for timing in timings if timing.tpot_s is not None],
        "e2e_latency": [timing.e2e_s * 1e3 for timing in timings],
        "first_gap": [timing.first_gap_s * 1e3 for timing in timings if timing.first_gap_s is not None],
    }
    if all(timing.itl_s is not None for timing in timings):
        values["itl"] = [gap * 1e3 for timing in timings for gap in timing.itl_s or ()]
    return {name: values[name] for name in LATENCIES if values.get(name)}


def latency_summaries(timings: Sequence[RequestTiming]) -> dict[str, Summary]:
    summaries = {name: summarize(values) for name, values in latency_values(timings).items()}
    return {name: summary for name, summary in summaries.items() if summary is not None}


def peak_concurrency(records: Sequence[RequestRecord]) -> int:
    """The most requests that were in flight at once."""
    changes = [(record.sent_s, 1) for record in records] + [(record.ended_s, -1) for record in records]
    peak = now = 0
    for _, change in sorted(changes):
        now += change
        peak = max(peak, now)
    return peak


def _why_withheld(num_all: int, num_failed: int, allowed_failures: float) -> str:
    if num_all == num_failed:
        return "no request succeeded"
    if num_failed > allowed_failures * num_all:
        return (
            f"{num_failed} of {num_all} requests failed: a latency over the others would flatter the server "
            f"(--allow-failures accepts a share)"
        )
    return ""


def _input_tokens(record: RequestRecord) -> int:
    return record.prompt_tokens if record.prompt_tokens >= 0 else record.expected_prompt_tokens or -1


def _total(counts: Sequence[int]) -> int | None:
    return None if any(count < 0 for count in counts) else sum(counts)


def _rate(count: int | None, duration_s: float) -> float | None:
    return None if count is None else count / duration_s


def _stalls(timings: Sequence[RequestTiming]) -> Stalls | None:
    gaps = sorted(gap for timing in timings for gap in timing.chunk_itl_s)
    if not gaps:
        return None
    threshold = STALL_FACTOR * quantile(gaps, 0.5)
    long = [gap for gap in gaps if gap > threshold]
    return Stalls(
        count=len(long),
        share=len(long) / len(gaps),
        requests=sum(any(gap > threshold for gap in timing.chunk_itl_s) for timing in timings),
        threshold_ms=threshold * 1e3,
        worst_ms=gaps[-1] * 1e3,
        total_s=sum(long),
    )


def _goodput(
    records: Sequence[RequestRecord],
    good: Sequence[RequestRecord],
    timings: Sequence[RequestTiming],
    objectives: Sequence[Objective],
    duration_s: float,
) -> Goodput:
    kept = [record for record, timing in zip(good, timings, strict=True) if is_good(timing, objectives)]
    tokens = sum(max(record.output_tokens, 0) for record in kept)
    share = len(kept) / len(records) if records else 0.0
    return Goodput(len(kept), share, len(kept) / duration_s, tokens / duration_s)
