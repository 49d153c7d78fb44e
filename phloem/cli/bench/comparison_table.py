"""A comparison as a table."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from phloem.shared.bench.comparison import Comparison, Ratio

_STYLES = {"better": "green", "worse": "red", "same": "", "unknown": "yellow"}


def print_comparison(comparison: Comparison, console: Console) -> None:
    """One row per figure: both values, their ratio, its interval, and what that says."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(escape(f"{comparison.b} / {comparison.a}"))
    for title in (comparison.a, comparison.b, "ratio", "95% interval", ""):
        table.add_column(escape(title), justify="right")
    for ratio in comparison.ratios:
        table.add_row(*_cells(ratio))
    console.print(table)
    for caveat in comparison.caveats:
        console.print(f"caution: {caveat}", markup=False, highlight=False, soft_wrap=True)


def _cells(ratio: Ratio) -> list[str]:
    interval = "-" if ratio.low is None or ratio.high is None else f"{ratio.low:.3f} .. {ratio.high:.3f}"
    style = _STYLES[ratio.verdict]
    verdict = f"[{style}]{ratio.verdict}[/]" if style else ratio.verdict
    return [ratio.label, f"{ratio.a:,.2f}", f"{ratio.b:,.2f}", f"{ratio.ratio:.3f}", interval, verdict]
