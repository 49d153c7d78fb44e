"""What `phloem bench offline` prints of a report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from phloem.shared.errors import PhloemError

if TYPE_CHECKING:  # it imports torch
    from phloem.shared.engine.offline.bench import OfflineReport


def print_report(report: OfflineReport, console: Console) -> None:
    """The device's ceilings, and each figure beside its floor."""
    console.print(
        f"{report.model} {report.dtype} on {report.device}: reads {report.read_gb_per_s:.0f} GB/s, "
        f"multiplies {report.matmul_tflops:.1f} TFLOP/s; ready after {report.start_s:.1f} s",
        soft_wrap=True,
    )
    table = Table("what", box=None, pad_edge=False)
    for head in ("batch", "tokens", "measured ms", "floor ms", "ratio", "p99 ms", "host ms", "idle %"):
        table.add_column(head, justify="right", overflow="fold")  # a figure that is cut off says nothing
    for row in report.measurements:
        table.add_row(
            row.kind,
            str(row.batch),
            str(row.tokens),
            f"{row.measured_ms:.2f}",
            f"{row.floor_ms:.2f}",
            f"{row.ratio:.2f}",
            f"{row.p99_ms:.2f}",
            f"{row.host_ms:.2f}" if row.host_ms else "",
            f"{row.idle_percent:.1f}" if row.idle_percent is not None else "",
        )
    console.print(table)


def print_bars(report: OfflineReport, console: Console) -> int:
    """Each bar beside what this run has; the exit code. Raises `PhloemError` where no bar holds for the
    model or the device."""
    from phloem.shared.engine.offline.bars import bars_of, measured_met, why_not_judged

    reason = why_not_judged(report.shape, report.dtype, report.device)
    if reason is not None:
        raise PhloemError("not_judged", f"--check: {reason}")
    bars = bars_of(report.measurements, report.start_s)
    table = Table("bar", "at most", "measured", "")
    for bar in bars:
        found = f"{bar.value:.2f} {bar.unit}" if bar.is_measured else "not measured"
        table.add_row(bar.what, f"{bar.bound:g} {bar.unit}", found, bar.verdict if bar.is_measured else "")
    console.print(table)
    return 0 if measured_met(bars) else 1
