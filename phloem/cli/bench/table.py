"""The result as a table: one column per target, the rows of SGLang's bench_serving and more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from phloem.shared.bench.result import RunResult, TargetResult

_LATENCIES = (
    ("ttft", "TTFT"),
    ("itl", "ITL"),
    ("chunk_itl", "ITL per chunk"),
    ("tpot", "TPOT"),
    ("e2e_latency", "E2E latency"),
    ("first_gap", "Token 0 to 1"),
)
_STATS = ("mean", "median", "p90", "p95", "p99", "max")
_MISSING = "-"


class _Row(NamedTuple):
    label: str
    key: str
    digits: int = 2


_COUNTS = (
    _Row("Successful requests", "completed", 0),
    _Row("Failed requests", "failed", 0),
    _Row("Benchmark duration (s)", "duration"),
    _Row("Total input tokens", "total_input_tokens", 0),
    _Row("Total generated tokens", "total_output_tokens", 0),
    _Row("Total generated tokens (retokenized)", "total_output_tokens_retokenized", 0),
    _Row("Request throughput (req/s)", "request_throughput"),
    _Row("Input token throughput (tok/s)", "input_throughput"),
    _Row("Output token throughput (tok/s)", "output_throughput"),
    _Row("Total token throughput (tok/s)", "total_throughput"),
    _Row("Concurrency", "concurrency"),
    _Row("Peak concurrency", "peak_concurrency", 0),
    _Row("Cached input tokens", "total_cached_tokens", 0),
)
_STALLS = (
    _Row("Stalls (gaps over 5x the median)", "stalls_count", 0),
    _Row("Requests with a stall", "stalls_requests", 0),
    _Row("Longest gap (ms)", "stalls_worst_ms"),
)
_GOODPUT = (
    _Row("Good requests (SLO)", "goodput_good", 0),
    _Row("Goodput (req/s)", "goodput_requests_per_s"),
    _Row("Goodput (tok/s)", "goodput_tokens_per_s"),
)


def print_result(result: RunResult, console: Console) -> None:
    """The table, then what there is to say about the run."""
    console.print(_counts_table(result.targets))
    if any(f"mean_{metric}_ms" in target.figures for target in result.targets for metric, _ in _LATENCIES):
        console.print()
        console.print(_latency_table(result.targets))
    for line in _lines(result):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _counts_table(targets: Sequence[TargetResult]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("Serving benchmark")
    for target in targets:
        table.add_column(escape(target.name), justify="right")
    for label, cells in _rows(targets, (*_COUNTS, *_STALLS, *_GOODPUT)):
        table.add_row(label, *cells)
    return table


def _latency_table(targets: Sequence[TargetResult]) -> Table:
    """A row for each latency (and target, where there are several), a column for each statistic."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("Latency (ms)")
    for stat in _STATS:
        table.add_column(stat.capitalize(), justify="right")
    for metric, title in _LATENCIES:
        rows = [(target.name, _stat_cells(target, metric)) for target in targets]
        kept = [(name, cells) for name, cells in rows if cells[0] != _MISSING]
        if kept and len(targets) > 1:
            table.add_row(f"[bold]{title}[/]")
        for name, cells in kept:
            table.add_row(title if len(targets) == 1 else f"  {escape(name)}", *cells)
    return table


def _stat_cells(target: TargetResult, metric: str) -> list[str]:
    return [_cell(target.figures.get(f"{stat}_{metric}_ms"), 2) for stat in _STATS]


def _rows(targets: Sequence[TargetResult], rows: Sequence[_Row]) -> list[tuple[str, list[str]]]:
    """Rows that some target has."""
    cells = [
        (row.label, [_cell(target.figures.get(row.key), row.digits) for target in targets]) for row in rows
    ]
    return [(label, values) for label, values in cells if any(value != _MISSING for value in values)]


def _cell(value: float | int | str | None, digits: int) -> str:
    return f"{value:,.{digits}f}" if isinstance(value, int | float) else _MISSING


def _lines(result: RunResult) -> Iterator[str]:
    lag = result.lag
    late = lag.loop.p99 if lag.loop is not None else 0.0
    limit = f"limit {lag.limit_ms:.1f}"
    yield f"client: p99 lag {late:.1f} ms ({limit}), {lag.cpu_share:.0%} of a core, {lag.priority}"
    for target in result.targets:
        for trial in target.trials:
            verdict = "holds" if trial.holds else "client too late" if trial.is_spoiled else "fails"
            yield f"{target.name}: {trial.rate:.3g}/s: {trial.good_share:.1%} good, {verdict}"
        if target.trials:
            found = f"{target.found_rate:.3g} sessions/s" if target.found_rate else "none found"
            yield f"{target.name}: highest rate that holds the SLO: {found}"
        for error, count in _errors(target):
            yield f"{target.name}: {count} x {error}"
    if result.is_interrupted:
        yield "interrupted: these are the figures up to then"
    for remark in result.remarks:
        yield f"note: {remark}"
    for problem in result.problems:
        yield f"INVALID: {problem}"


def _errors(target: TargetResult, most: int = 5) -> list[tuple[str, int]]:
    """The most frequent errors, with how often."""
    counts: dict[str, int] = {}
    for record in target.records:
        if record.error:
            counts[record.error] = counts.get(record.error, 0) + 1
    return sorted(counts.items(), key=lambda item: -item[1])[:most]
