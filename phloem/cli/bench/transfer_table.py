"""What `phloem bench transfer` found, as tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from phloem.shared.bench.bars import Bar

if TYPE_CHECKING:  # they import torch
    from phloem.shared.transfer_bench.bandwidth import BandwidthReport
    from phloem.shared.transfer_bench.run import TransferReport


def print_report(report: TransferReport, console: Console) -> None:
    if report.bandwidth is not None:
        _print_bandwidth(report.bandwidth, console)
    if report.exposed:
        _print_engines(report, console)
    table = Table("what", "value", "bar", "")
    for bar in report.bars:
        table.add_row(bar.what, f"{bar.value:.3f} {bar.unit}", bar.bound_text, _verdict(bar))
    console.print(table)


def _print_bandwidth(report: BandwidthReport, console: Console) -> None:
    console.print(
        f"{report.device}: pages of {report.page_bytes / 2**20:.3g} MiB, {report.staging_slots} staging "
        f"slots of {report.staging_bytes / 2**20:g} MiB, at most {report.max_ctas} CTAs; GB/s, medians"
    )
    table = Table("MiB", "raw", "pages", "ratio", "raw, ahead", "pages, ahead", "ratio, ahead")
    for size in report.sizes:
        table.add_row(
            f"{size.num_bytes / 2**20:g}",
            f"{size.raw:.2f}",
            _number(size.pages),
            _number(size.ratio),
            f"{size.raw_ahead:.2f}",
            _number(size.pages_ahead),
            _number(size.ratio_ahead),
        )
    console.print(table)


def _print_engines(report: TransferReport, console: Console) -> None:
    table = Table(
        "prompt", "MiB", "prefill ms", "token 0 to 1", "step", "beyond it", "exposed: median", "max"
    )
    for item in report.exposed:
        table.add_row(
            str(item.prompt_tokens),
            f"{item.num_bytes / 2**20:g}",
            f"{item.prefill_ms.median:.2f}",
            f"{item.first_gap_ms.median:.2f}",
            f"{item.step_ms:.2f}",
            f"{item.beyond_step_ms.median:.2f}",
            f"{item.exposed_ms.median:.2f}",
            f"{item.exposed_ms.max:.2f}",
        )
    console.print(table)
    table = Table("while KV moves", "without ms", "with ms", "slow-down", "KV moved GB/s")
    for slow in report.slow_downs:
        table.add_row(
            slow.what,
            f"{slow.without_ms:.3f}",
            f"{slow.with_ms:.3f}",
            f"{slow.ratio:.3f}",
            f"{slow.transfer_gb_per_s:.2f}",
        )
    console.print(table)


def print_logs(folder: Path, console: Console) -> None:
    """The last lines of what the processes said: why they failed."""
    for path in sorted(folder.glob("*.log")):
        lines = path.read_text(errors="replace").splitlines()[-12:]
        console.print(f"== {path.name}", *lines, sep="\n", markup=False)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _verdict(bar: Bar) -> str:
    return f"[red]{bar.verdict}[/red]" if bar.verdict == "MISSED" else bar.verdict
