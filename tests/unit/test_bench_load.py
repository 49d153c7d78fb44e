"""Arrivals, the search for a rate, resampling, and the verdict on the client's own lag."""

from __future__ import annotations

import itertools
import random
import statistics
from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from phloem.shared.bench.arrivals import Arrival, Rate, arrival_times, parse_ramp
from phloem.shared.bench.bootstrap import (
    ClusteredValues,
    RatesOfRounds,
    interval,
    ratio_intervals,
    student_quantile,
)
from phloem.shared.bench.lag_report import judge_lag
from phloem.shared.bench.options import SearchOptions
from phloem.shared.bench.protocol import LagSamples
from phloem.shared.bench.rate_search import RateSearch
from phloem.shared.errors import ConfigError


def first_times(number: int, rate: Rate, arrival: Arrival = "poisson", **options: int) -> list[float]:
    return list(itertools.islice(arrival_times(rate, arrival, **options), number))


def test_constant_arrivals_are_evenly_spaced_from_zero() -> None:
    assert first_times(4, Rate(20, 20), "constant") == pytest.approx([0, 0.05, 0.1, 0.15])


def test_poisson_gaps_have_the_mean_and_spread_of_an_exponential() -> None:
    times = first_times(20_000, Rate(50, 50), seed=3)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(0.02, rel=0.03)
    assert statistics.pstdev(gaps) == pytest.approx(0.02, rel=0.05)


def test_equal_seeds_arrive_alike() -> None:
    assert first_times(50, Rate(5, 5), seed=1) == first_times(50, Rate(5, 5), seed=1)
    assert first_times(50, Rate(5, 5), seed=1) != first_times(50, Rate(5, 5), seed=2)


def test_bursts_keep_the_mean_rate() -> None:
    times = first_times(20_000, Rate(50, 50), "burst", burst_size=5, seed=1)
    assert [len(list(group)) for _, group in itertools.groupby(times[:100])] == [5] * 20
    assert times[-1] == pytest.approx(20_000 / 50, rel=0.05)


def test_infinite_rate_sends_all_at_once() -> None:
    assert first_times(3, Rate(float("inf"), float("inf"))) == [0, 0, 0]


@given(st.floats(0.5, 50), st.floats(0.5, 50), st.floats(0.5, 30), st.floats(0, 500))
def test_ramp_inverts_the_integral_of_the_rate(
    first: float, last: float, ramp_s: float, count: float
) -> None:
    seconds = Rate(first, last, ramp_s).time_of(count)
    inside, after = min(seconds, ramp_s), max(seconds - ramp_s, 0)
    integral = first * inside + (last - first) * inside**2 / (2 * ramp_s) + last * after
    assert integral == pytest.approx(count, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("text", ["0", "-1", "x", "3:0", ""])
def test_bad_rates_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--request-rate"):
        parse_ramp(text, "--request-rate")


@pytest.mark.parametrize("limit", [0.3, 3.0, 10.0, 37.0])
def test_search_finds_the_rate_to_the_precision(limit: float) -> None:
    search = RateSearch(4.0, SearchOptions(precision=0.05))
    while (rate := search.next_rate) is not None:
        search.observe(1.0 if rate <= limit else 0.2)
    assert search.found is not None
    assert limit / 1.06 <= search.found <= limit


def test_search_confirms_and_goes_lower_after_a_lucky_trial() -> None:
    search = RateSearch(8.0, SearchOptions(precision=0.1))
    was_lucky = False
    while (rate := search.next_rate) is not None:
        is_lucky = not was_lucky and 5.0 < rate < 8.0
        was_lucky = was_lucky or is_lucky
        search.observe(1.0 if rate <= 5.0 or is_lucky else 0.0)
    assert was_lucky
    assert search.found is not None
    assert 4.4 <= search.found <= 5.0


def test_search_does_not_believe_a_late_client() -> None:
    search = RateSearch(4.0, SearchOptions(precision=0.1))
    while (rate := search.next_rate) is not None:
        search.observe(1.0, is_spoiled=rate > 6.0)
    assert search.found is not None
    assert 5.4 <= search.found <= 6.0
    assert any(trial.is_spoiled and not trial.holds for trial in search.trials)


def test_search_gives_up_when_no_rate_holds() -> None:
    search = RateSearch(1.0, SearchOptions())
    while search.next_rate is not None:
        search.observe(0.0)
    assert search.found is None
    assert len(search.trials) <= 20


@given(st.lists(st.lists(st.floats(0, 100), max_size=5), min_size=1, max_size=6), st.data())
def test_weighted_stats_are_those_of_repeated_values(
    clusters: list[list[float]], data: st.DataObject
) -> None:
    weights = data.draw(st.lists(st.integers(0, 3), min_size=len(clusters), max_size=len(clusters)))
    repeated = [v for values, weight in zip(clusters, weights, strict=True) for v in values * weight]
    clustered = ClusteredValues(clusters)
    for name, share in (("median", 50), ("p99", 99), ("p90", 90)):
        got = clustered.stat(name, weights)
        assert got == pytest.approx(np.percentile(repeated, share)) if repeated else np.isnan(got)
    mean = clustered.stat("mean", weights)
    assert mean == pytest.approx(np.mean(repeated), abs=1e-9) if repeated else np.isnan(mean)


def test_intervals_cover_the_true_ratio_about_as_often_as_they_say() -> None:
    rng = random.Random(5)
    covered = 0
    for trial in range(60):
        a = [[rng.expovariate(1.0)] for _ in range(80)]
        b = [[rng.expovariate(1.0) * 1.5] for _ in range(80)]
        found = ratio_intervals(
            ClusteredValues(a),
            ClusteredValues(b),
            (80, 80),
            ("mean",),
            is_paired=False,
            num_resamples=200,
            seed=trial,
        )["mean"]
        assert found is not None
        covered += found[0] <= 1.5 <= found[1]
    assert 50 <= covered <= 60


def test_pairing_takes_out_a_common_drift() -> None:
    rng = random.Random(1)
    drift = [rng.uniform(1, 10) for _ in range(10)]
    a = ClusteredValues([[speed] for speed in drift])
    b = ClusteredValues([[speed * 1.1] for speed in drift])
    widths = []
    for is_paired in (True, False):
        found = ratio_intervals(a, b, (10, 10), ("mean",), is_paired=is_paired, num_resamples=300, seed=0)[
            "mean"
        ]
        assert found is not None
        widths.append(found[1] - found[0])
    assert widths[0] < 1e-9 < 0.2 < widths[1]


def test_an_interval_of_what_is_no_number_is_none() -> None:
    assert interval([1.0, float("nan")], 10) is None
    assert interval([1.0, 1.1], 1) is None


@pytest.mark.parametrize("degrees", [4, 9, 30, 1000])
def test_student_quantile_is_scipys(degrees: int) -> None:
    assert student_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=0.01)


def test_few_rounds_make_a_wider_interval() -> None:
    values = [index / 1000 for index in range(1001)]
    many, few = interval(values, 1000), interval(values, 5)
    assert many is not None and few is not None
    assert many == pytest.approx((0.025, 0.975), abs=1e-3)
    assert few[0] < 0.002 and few[1] > 0.998


def test_rate_of_rounds_weighs_them_by_their_time() -> None:
    rates = RatesOfRounds([(10, 1.0), (10, 4.0)])
    assert rates.stat("rate") == pytest.approx(4.0)
    assert rates.stat("rate", [2, 0]) == pytest.approx(10.0)


def lag_of(milliseconds: list[float]) -> LagSamples:
    seconds = array("d", [value / 1e3 for value in milliseconds]).tobytes()
    return LagSamples(loop=seconds, spans=b"", dispatch=b"", cpu_s=0.5, wall_s=2.0)


def test_lag_spoils_a_run_by_its_99th_percentile() -> None:
    quiet = judge_lag([lag_of([0.1] * 995 + [50] * 5)], limit_ms=None, median_chunk_itl_ms=10)
    late = judge_lag([lag_of([0.1] * 980 + [50] * 20)], limit_ms=None, median_chunk_itl_ms=10)
    assert not quiet.is_spoiled
    assert quiet.reason == ""
    assert late.is_spoiled
    assert "event loop" in late.reason
    assert quiet.cpu_share == 0.25


def test_allowed_lag_follows_the_gaps_that_are_measured() -> None:
    samples = [lag_of([5.0] * 100)]
    assert judge_lag(samples, limit_ms=None, median_chunk_itl_ms=10).is_spoiled
    assert not judge_lag(samples, limit_ms=None, median_chunk_itl_ms=40).is_spoiled
    assert not judge_lag(samples, limit_ms=6.0, median_chunk_itl_ms=10).is_spoiled
    assert judge_lag([lag_of([1.0])], limit_ms=None, median_chunk_itl_ms=None).limit_ms == 2.0
