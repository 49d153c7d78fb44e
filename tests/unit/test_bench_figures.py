"""The numbers of a benchmark: statistics, times of a request, figures, objectives."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phloem.shared.bench.figures import Figures, compute_figures
from phloem.shared.bench.record import RequestRecord
from phloem.shared.bench.slo import Objective, is_good, parse_duration, parse_slo
from phloem.shared.bench.statistics import quantile, summarize
from phloem.shared.bench.timing import timing_of
from phloem.shared.errors import ConfigError


def record(
    offsets_ms: Sequence[float] = (50, 60, 70),
    *,
    tokens: Sequence[int] = (),
    output_tokens: int = -1,
    sent_s: float = 0.0,
    end_ms: float | None = None,
    error: str = "",
    finish_reason: str = "length",
    max_tokens: int = 3,
    prompt_tokens: int = -1,
    cached_tokens: int = -1,
) -> RequestRecord:
    last = offsets_ms[-1] if end_ms is None and offsets_ms else end_ms or 0.0
    return RequestRecord(
        target=0,
        block=0,
        session=0,
        turn=0,
        sent_s=sent_s,
        ended_s=sent_s + last / 1e3,
        scheduled_s=sent_s,
        max_tokens=max_tokens,
        output_tokens=output_tokens,
        chunk_offsets=array("d", [offset / 1e3 for offset in offsets_ms]).tobytes(),
        chunk_tokens=array("I", tokens).tobytes(),
        finish_reason=finish_reason,
        error=error,
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
    )


def figures(records: Sequence[RequestRecord], **options: float) -> Figures:
    return compute_figures(records, 2.0, **options)  # type: ignore[arg-type]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60))
def test_summary_is_numpys(values: list[float]) -> None:
    summary = summarize(values)
    assert summary is not None
    expected = [np.mean(values), np.std(values), np.max(values)]
    expected += [np.percentile(values, share) for share in (50, 90, 95, 99)]
    got = [summary.mean, summary.std, summary.max, summary.median, summary.p90, summary.p95, summary.p99]
    assert got == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_nothing_has_no_summary_instead_of_zeros() -> None:
    assert summarize([]) is None
    with pytest.raises(ValueError, match="no values"):
        quantile([], 0.5)


def test_times_of_a_request_with_one_token_a_chunk() -> None:
    timing = timing_of(record((50, 60, 80), tokens=(1, 1, 1), output_tokens=3, end_ms=81))
    assert timing.ttft_s == pytest.approx(0.050)
    assert timing.e2e_s == pytest.approx(0.081)
    assert timing.itl_s == pytest.approx([0.010, 0.020])
    assert timing.chunk_itl_s == pytest.approx([0.010, 0.020])
    assert timing.tpot_s == pytest.approx((0.081 - 0.050) / 2)
    assert timing.first_gap_s == pytest.approx(0.010)


def test_itl_per_token_divides_a_chunk_among_its_tokens() -> None:
    timing = timing_of(record((50, 80), tokens=(1, 3), output_tokens=4))
    assert timing.itl_s == pytest.approx([0.010] * 3)
    assert timing.chunk_itl_s == pytest.approx([0.030])


def test_no_gap_from_token_0_to_1_when_both_came_at_once() -> None:
    assert timing_of(record((50, 80), tokens=(2, 2), output_tokens=4)).first_gap_s is None


def test_unknown_chunk_sizes_give_no_itl_per_token() -> None:
    known = record((50, 60, 70), output_tokens=3)
    with_end_token = record((50, 60, 70), output_tokens=4, finish_reason="stop")
    unknown = record((50, 60, 70), output_tokens=7)
    assert timing_of(known).itl_s == pytest.approx([0.01, 0.01])
    assert timing_of(with_end_token).itl_s == pytest.approx([0.01, 0.01])
    assert timing_of(unknown).itl_s is None
    result = figures([known, unknown])
    assert "itl" not in result.latencies
    assert result.latencies["chunk_itl"].count == 4


def test_a_single_token_has_no_tpot() -> None:
    assert timing_of(record((50,), tokens=(1,), output_tokens=1)).tpot_s is None


def test_throughputs_count_what_succeeded() -> None:
    good = record(tokens=(1, 1, 1), output_tokens=3, prompt_tokens=10, cached_tokens=4)
    bad = record((), error="HTTP 503: full")
    result = figures([good, good, bad], allowed_failures=0.5)
    assert (result.completed, result.failed) == (2, 1)
    assert (result.total_input_tokens, result.total_output_tokens) == (20, 6)
    assert (result.request_throughput, result.output_throughput) == (1.0, 3.0)
    assert (result.total_cached_tokens, result.cached_share) == (8, 0.4)
    assert result.concurrency == pytest.approx(0.070)


def test_latencies_over_failed_requests_are_refused() -> None:
    good, bad = record(output_tokens=3), record((), error="timeout")
    refused = figures([good] * 99 + [bad])
    assert refused.latencies == {}
    assert refused.concurrency is None
    assert "1 of 100 requests failed" in refused.withheld
    assert not any(key.endswith("_ttft_ms") for key in refused.flat())
    assert figures([good] * 99 + [bad], allowed_failures=0.01).latencies["ttft"].count == 99
    assert figures([bad], allowed_failures=0.99).withheld == "no request succeeded"


def test_unknown_token_counts_are_not_guessed() -> None:
    result = figures([record(output_tokens=-1)])
    assert result.total_output_tokens is None
    assert result.output_throughput is None


def test_stalls_are_gaps_over_five_times_the_median() -> None:
    offsets = [50.0]
    for gap in [10] * 20 + [51, 49, 300]:
        offsets.append(offsets[-1] + gap)
    result = figures([record(offsets), record([50.0, 60.0])])
    assert result.stalls is not None
    assert (result.stalls.count, result.stalls.requests) == (2, 1)
    assert result.stalls.worst_ms == pytest.approx(300)
    assert result.stalls.total_s == pytest.approx(0.351)


def test_peak_concurrency_counts_overlaps() -> None:
    assert figures([record(sent_s=0.0), record(sent_s=0.05), record(sent_s=0.2)]).peak_concurrency == 2


def test_goodput_counts_failed_requests_as_bad() -> None:
    fast, slow = record((50, 60, 70), output_tokens=3), record((500, 510, 520), output_tokens=3)
    failed = record((), error="x")
    result = compute_figures([fast, slow, failed], 2.0, objectives=parse_slo("ttft:100ms"))
    assert result.goodput is not None
    assert (result.goodput.good, result.goodput.requests_per_s, result.goodput.tokens_per_s) == (1, 0.5, 1.5)
    assert result.goodput.share == pytest.approx(1 / 3)


def test_objective_on_itl_looks_at_the_requests_own_tail() -> None:
    timing = timing_of(record((50, 60, 70, 170), tokens=(1, 1, 1, 1), output_tokens=4))
    assert not is_good(timing, parse_slo("itl:30ms"))
    assert not is_good(timing, parse_slo("itl.mean:30ms"))
    assert is_good(timing, parse_slo("itl.mean:41ms,ttft:51ms,tpot:41ms,e2e:171ms"))
    assert is_good(timing, parse_slo("itl.median:11ms"))
    assert not is_good(timing, parse_slo("itl.max:99ms"))


@pytest.mark.parametrize(
    ("text", "seconds"), [("500ms", 0.5), ("30s", 30), ("2m", 120), ("1.5h", 5400), ("7", 7), ("10us", 1e-5)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "fast", "-1s", "5 parsecs", "ms"])
def test_bad_durations_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="duration"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["ttft", "speed:3s", "ttft.p99:3s", "itl.p42:3s", "ttft:x"])
def test_bad_objectives_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_slo(text)


def test_slo_reads_every_part() -> None:
    assert parse_slo("ttft:500ms, itl:30ms,itl.max:1s") == (
        Objective("ttft", 0.5),
        Objective("itl", 0.03),
        Objective("itl", 1.0, "max"),
    )
