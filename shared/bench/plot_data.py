"""What the plots show: curves as points, the same for every kind of file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from phloem.shared.bench.figures import latency_values
from phloem.shared.bench.record import RequestRecord
from phloem.shared.bench.result import RunResult, TargetResult
from phloem.shared.bench.timing import chunk_token_counts, timing_of

_CDF_POINTS = 400
_MAX_DOTS = 5000
_NUM_BINS = 120
# Chunks that came in one read have no gap: they are drawn at the edge of a logarithmic axis.
_LEAST_MS = 0.01
_LOG_FROM = 10
_CDFS = (
    ("ttft", "Time to first token"),
    ("itl", "Inter-token latency"),
    ("tpot", "Time per output token"),
    ("e2e_latency", "End-to-end latency"),
)


class Curve(NamedTuple):
    """One target's points in a chart; `dots` are not joined."""

    name: str
    xs: list[float]
    ys: list[float]
    dots: bool = False


class Chart(NamedTuple):
    title: str
    x_label: str
    y_label: str
    is_x_log: bool
    curves: list[Curve]


def charts_of(result: RunResult) -> list[Chart]:
    """CDFs of the latencies, then TTFT, output throughput and requests in flight over the run's time. Charts
    without a point are left out."""
    good = {target.name: _good(target) for target in result.targets}
    charts = [_cdf(metric, title, good) for metric, title in _CDFS]
    charts.append(_ttft_over_time(good))
    charts += [_tokens_over_time(good), _in_flight(result.targets)]
    return [chart for chart in charts if any(curve.xs for curve in chart.curves)]


def _good(target: TargetResult) -> list[RequestRecord]:
    return [saved.record(0) for saved in target.records if not saved.error]


def _cdf(metric: str, title: str, good: dict[str, list[RequestRecord]]) -> Chart:
    curves = []
    for name, records in good.items():
        values = latency_values([timing_of(record) for record in records])
        xs, ys = cdf_points(values.get(metric) or (values.get("chunk_itl", []) if metric == "itl" else []))
        curves.append(Curve(name, [max(x, _LEAST_MS) for x in xs], ys))
    points = [x for curve in curves for x in curve.xs]
    is_wide = bool(points) and max(points) > _LOG_FROM * min(points)
    return Chart(title, "ms", "share of values below", is_wide, curves)


def cdf_points(values: Sequence[float], num_points: int = _CDF_POINTS) -> tuple[list[float], list[float]]:
    """At most about `num_points` of the cumulative distribution, with all of its last hundredth's shape."""
    ordered = sorted(values)
    count = len(ordered)
    body = range(0, count, max(count // num_points, 1))
    tail = range(max(int(count * 0.99), 0), count, max(count // (100 * num_points), 1))
    indices = sorted({*body, *tail, *([count - 1] if count else [])})
    return [round(ordered[i], 4) for i in indices], [round((i + 1) / count, 6) for i in indices]


def _ttft_over_time(good: dict[str, list[RequestRecord]]) -> Chart:
    curves = []
    for name, records in good.items():
        kept = sorted(records, key=lambda record: record.sent_s)[:: max(len(records) // _MAX_DOTS, 1)]
        xs = [round(record.sent_s, 4) for record in kept]
        curves.append(Curve(name, xs, [round(record.ttft_s * 1e3, 3) for record in kept], dots=True))
    return Chart("TTFT over time", "s", "ms", False, curves)


def _tokens_over_time(good: dict[str, list[RequestRecord]]) -> Chart:
    ends = [record.ended_s for records in good.values() for record in records]
    width = max(max(ends, default=0.0) / _NUM_BINS, 0.05)
    curves = []
    for name, records in good.items():
        bins: dict[int, int] = {}
        for record in records:
            counts = chunk_token_counts(record) or [1] * len(record.offsets())
            for offset, count in zip(record.offsets(), counts, strict=True):
                place = int((record.sent_s + offset) / width)
                bins[place] = bins.get(place, 0) + count
        places = range(max(bins) + 1) if bins else range(0)
        xs = [round(place * width, 4) for place in places]
        curves.append(Curve(name, xs, [round(bins.get(place, 0) / width, 3) for place in places]))
    return Chart("Output tokens over time", "s", "tokens/s", False, curves)


def _in_flight(targets: Sequence[TargetResult]) -> Chart:
    curves = []
    for target in targets:
        records = [saved.record(0) for saved in target.records]
        changes = sorted(
            [(record.sent_s, 1) for record in records] + [(record.ended_s, -1) for record in records]
        )
        now, xs, ys = 0, [], []
        for at_s, change in changes:
            xs += [round(at_s, 4)] * 2
            ys += [float(now), float(now + change)]
            now += change
        step = max(len(xs) // (2 * _MAX_DOTS), 1)
        curves.append(Curve(target.name, xs[::step], ys[::step]))
    return Chart("Requests in flight", "s", "requests", False, curves)
