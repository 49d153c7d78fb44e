"""Two results side by side: ratios, how sure they are, and what makes them hard to compare."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias

import msgspec

from phloem.shared.bench.bootstrap import ClusteredValues, RatesOfRounds, ratio_intervals
from phloem.shared.bench.figures import latency_values
from phloem.shared.bench.record import RequestRecord
from phloem.shared.bench.result import RunResult, TargetResult
from phloem.shared.bench.timing import timing_of

Verdict: TypeAlias = Literal["better", "worse", "same", "unknown"]

_STATS: dict[str, tuple[str, ...]] = {
    "ttft": ("mean", "median", "p99"),
    "itl": ("mean", "median", "p99"),
    "chunk_itl": ("mean", "median", "p99"),
    "tpot": ("mean", "p99"),
    "e2e_latency": ("mean", "p99"),
    "first_gap": ("median",),
}
_LABELS = {
    "ttft": "TTFT",
    "itl": "ITL",
    "chunk_itl": "ITL per chunk",
    "tpot": "TPOT",
    "e2e_latency": "E2E latency",
    "first_gap": "Token 0 to 1",
}
_THROUGHPUTS = (
    ("request_throughput", "Request throughput (req/s)"),
    ("output_throughput", "Output throughput (tok/s)"),
)
# Fewer rounds than this say nothing of the spread between rounds.
_FEWEST_ROUNDS = 5
_MAX_RESAMPLES = 2000
_MIN_RESAMPLES = 200
_WORK = 30_000_000  # values sorted through, which bounds the time to some seconds


class Ratio(msgspec.Struct, frozen=True):
    """A figure of both, b / a, the 95% interval of that (None: unknown) and its meaning. "same" means that no
    difference was shown, not that there is none."""

    label: str
    a: float
    b: float
    ratio: float
    low: float | None
    high: float | None
    verdict: Verdict


class Comparison(msgspec.Struct, frozen=True):
    """`caveats` say why the ratios may mean less than they seem to."""

    a: str
    b: str
    ratios: list[Ratio]
    caveats: list[str]


class _Clusters(NamedTuple):
    """The successful requests of both sides, by what is resampled."""

    a: list[list[RequestRecord]]
    b: list[list[RequestRecord]]
    are_rounds: bool
    is_paired: bool


def compare_targets(
    result_a: RunResult, a: TargetResult, result_b: RunResult, b: TargetResult, *, seed: int = 0
) -> Comparison:
    """b against a. With five rounds or more on both sides, rounds are resampled (in pairs when both targets
    were in one run); otherwise sessions."""
    is_one_run = result_a is result_b
    clusters = _cluster(a, b, is_one_run)
    ratios = [*_throughputs(a, b, clusters, seed), *_latencies(clusters, seed)]
    names = (a.name, b.name) if a.name != b.name else (f"{a.name} (a)", f"{b.name} (b)")
    return Comparison(*names, ratios, list(_caveats(result_a, result_b, clusters, is_one_run)))


def _cluster(a: TargetResult, b: TargetResult, is_one_run: bool) -> _Clusters:
    are_rounds = min(len(a.blocks), len(b.blocks)) >= _FEWEST_ROUNDS
    is_paired = are_rounds and is_one_run and len(a.blocks) == len(b.blocks)
    return _Clusters(_group(a, are_rounds), _group(b, are_rounds), are_rounds, is_paired)


def _group(target: TargetResult, by_round: bool) -> list[list[RequestRecord]]:
    groups: dict[tuple[int, int], list[RequestRecord]] = {}
    for saved in sorted(target.records, key=lambda record: (record.block, record.session)):
        if not saved.error:
            key = (saved.block, 0 if by_round else saved.session)
            groups.setdefault(key, []).append(saved.record(0))
    return list(groups.values())


def _latencies(clusters: _Clusters, seed: int) -> Iterator[Ratio]:
    values_a, values_b = _values(clusters.a), _values(clusters.b)
    is_paired = clusters.is_paired and len(clusters.a) == len(clusters.b)
    for metric, stats in _STATS.items():
        if metric not in values_a or metric not in values_b or (metric == "chunk_itl" and "itl" in values_a):
            continue
        a, b = values_a[metric], values_b[metric]
        intervals = ratio_intervals(
            a,
            b,
            (len(clusters.a), len(clusters.b)),
            stats,
            is_paired=is_paired,
            num_resamples=_num_resamples(a.count + b.count),
            seed=seed,
        )
        for stat in stats:
            label = f"{stat.capitalize()} {_LABELS[metric]} (ms)"
            yield _ratio(label, a.stat(stat), b.stat(stat), intervals[stat], lower_is_better=True)


def _num_resamples(num_values: int) -> int:
    return max(_MIN_RESAMPLES, min(_MAX_RESAMPLES, _WORK // max(num_values, 1)))


def _values(clusters: Sequence[Sequence[RequestRecord]]) -> dict[str, ClusteredValues]:
    """Metrics that every cluster's requests have the counts for."""
    per_cluster = [latency_values([timing_of(record) for record in records]) for records in clusters]
    metrics = [metric for metric in _STATS if any(metric in values for values in per_cluster)]
    whole = latency_values([timing_of(record) for record in itertools.chain.from_iterable(clusters)])
    return {
        metric: ClusteredValues([values.get(metric, []) for values in per_cluster])
        for metric in metrics
        if metric in whole
    }


def _throughputs(a: TargetResult, b: TargetResult, clusters: _Clusters, seed: int) -> Iterator[Ratio]:
    for name, label in _THROUGHPUTS:
        whole_a, whole_b = a.figures.get(name), b.figures.get(name)
        if not isinstance(whole_a, int | float) or not isinstance(whole_b, int | float) or not whole_a:
            continue
        interval = None
        if clusters.are_rounds:
            interval = ratio_intervals(
                RatesOfRounds(list(_rounds(a, name))),
                RatesOfRounds(list(_rounds(b, name))),
                (len(a.blocks), len(b.blocks)),
                ("rate",),
                is_paired=clusters.is_paired,
                num_resamples=_MAX_RESAMPLES,
                seed=seed,
            )["rate"]
        yield _ratio(label, whole_a, whole_b, interval, lower_is_better=False)


def _rounds(target: TargetResult, name: str) -> Iterator[tuple[float, float]]:
    """What each round got done, and in how long."""
    numbers = sorted({record.block for record in target.records})
    for number, block in zip(numbers, target.blocks, strict=False):
        done = [record for record in target.records if record.block == number and not record.error]
        count = len(done) if name == "request_throughput" else sum(r.output_tokens or 0 for r in done)
        yield float(count), block.duration_s


def _ratio(
    label: str, a: float, b: float, interval: tuple[float, float] | None, *, lower_is_better: bool
) -> Ratio:
    low, high = interval if interval is not None else (None, None)
    verdict: Verdict = "unknown"
    if low is not None and high is not None:
        is_lower, is_higher = high < 1, low > 1
        verdict = "same"
        if is_lower or is_higher:
            verdict = "better" if is_lower == lower_is_better else "worse"
    return Ratio(label, a, b, b / a if a else float("inf"), low, high, verdict)


def _caveats(a: RunResult, b: RunResult, clusters: _Clusters, is_one_run: bool) -> Iterator[str]:
    if not clusters.are_rounds:
        yield (
            "intervals are over sessions of single blocks: they miss what changes from run to run. Measure "
            f"both in one run (two --target) with at least {_FEWEST_ROUNDS} --rounds"
        )
    for name, result in (("the run", a),) if is_one_run else (("the first run", a), ("the second run", b)):
        if not result.is_valid:
            yield f"{name} is invalid: {'; '.join(result.problems)}"
    if is_one_run:
        return
    yield "two separate runs: a machine that got slower in between looks like a slower server"
    if a.workload != b.workload:
        yield "the prompts differ (dataset, lengths or seed)"
    if a.options.load != b.options.load:
        yield "the load differs"
    for field in ("cpu", "usable_cores", "gpus", "packages"):
        if getattr(a.environment, field) != getattr(b.environment, field):
            yield f"the client's machine differs ({field})"
