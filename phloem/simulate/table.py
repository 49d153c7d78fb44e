"""Results as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from phloem.shared.bench.bars import Bar
from phloem.simulate.result import SimulationResult


def print_results(results: Sequence[SimulationResult], console: Console) -> None:
    """One row per run."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("policy")
    for title in (
        "G",
        "rate x",
        "TTFT p50",
        "p90",
        "p99 s",
        "TPOT p50",
        "p90 ms",
        "hits",
        "local",
        "CoV P",
        "D",
        "busy P",
        "D",
    ):
        table.add_column(title, justify="right")
    for result in results:
        table.add_row(*_cells(result))
    console.print(table)
    for result in results:
        for problem in result.problems:
            console.print(f"WRONG: {result.options.policy}: {problem}", markup=False, style="red")


def print_ideal(ideal: Mapping[str, float], console: Console, reached: float | None = None) -> None:
    """What one cache for the cluster would hit, and which share of that was `reached`."""
    rates = ", ".join(f"{name} {rate:.1%}" for name, rate in ideal.items())
    console.print(f"hit rate of one LRU cache with the memory of: {rates}", markup=False)
    if reached is not None:
        shares = ", ".join(f"{name} {reached / rate:.3f}" for name, rate in ideal.items() if rate)
        console.print(f"cost reaches of it: {shares}", markup=False)


def print_bars(bars: Sequence[Bar], console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("bar")
    for title in ("measured", "bound", ""):
        table.add_column(title, justify="right")
    for bar in bars:
        style = "green" if bar.is_met else "red"
        value = f"{bar.value:.3f} {bar.unit}".rstrip()
        table.add_row(bar.what, value, bar.bound_text, f"[{style}]{bar.verdict}[/]")
    console.print(table)


def _cells(result: SimulationResult) -> list[str]:
    options = result.options
    first, *others = result.balance
    second = others[0] if others else None
    return [
        options.policy,
        str(options.shape.num_gateways),
        f"{options.rate_scale:.3g}",
        f"{result.ttft_p50_s:.3f}",
        f"{result.ttft_p90_s:.3f}",
        f"{result.ttft_p99_s:.3f}",
        f"{result.tpot_p50_s * 1e3:.2f}",
        f"{result.tpot_p90_s * 1e3:.2f}",
        f"{result.hit_rate:.1%}",
        f"{result.local_share:.1%}",
        f"{first.load_cov:.3f}",
        f"{second.load_cov:.3f}" if second else "-",
        f"{first.utilization:.0%}",
        f"{second.utilization:.0%}" if second else "-",
    ]
