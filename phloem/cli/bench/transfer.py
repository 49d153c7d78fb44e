"""`phloem bench transfer`: KV from one device to another, beside the bare transport."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter
from rich.console import Console

from phloem.cli.bench.transfer_flags import ChannelFlags, PairFlags, WorkFlags, transfer_options
from phloem.cli.bench.transfer_table import print_logs, print_report
from phloem.cli.up.devices import count_gpus
from phloem.shared.bench.output_path import check_output_path, write_output

EXIT_MISSED = 1


def transfer(
    *,
    pair: PairFlags = PairFlags(),  # noqa: B008 - frozen
    work: WorkFlags = WorkFlags(),  # noqa: B008
    channel: ChannelFlags = ChannelFlags(),  # noqa: B008
    output: Annotated[Path | None, Parameter(name=["--output", "-o"], help="write it all as JSON")] = None,
    check: Annotated[bool, Parameter(help="exit with 1 when a bar is missed")] = False,
) -> int:
    """Measure KV transfer: bandwidth by size, exposed time per request, and what it costs others."""
    from phloem.shared.transfer_bench.run import run_transfer_bench

    if output is not None:
        check_output_path(output, "--output")
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="phloem-bench-") as name:
        folder = Path(name)
        options = transfer_options(pair, work, channel, num_gpus=count_gpus(os.environ), folder=folder)
        try:
            report = run_transfer_bench(options, lambda text: console.print(f"[dim]{text}[/dim]"))
        except Exception:
            print_logs(folder, console)
            raise
    print_report(report, console)
    if output is not None:
        write_output(output, msgspec.json.format(msgspec.json.encode(report)))
    return EXIT_MISSED if check and not report.holds else 0
