"""`phloem bench offline`: the engine alone, static batches, each figure beside its floor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter
from rich.console import Console

from phloem.cli.bench.offline_flags import EngineFlags, WorkFlags, engine_options, offline_work
from phloem.cli.bench.offline_table import print_bars, print_report
from phloem.shared.bench.output_path import check_output_path, write_output


def offline(
    *,
    engine: EngineFlags,
    work: WorkFlags = WorkFlags(),  # noqa: B008 - frozen
    output: Annotated[
        Path | None, Parameter(name=["--output", "-o"], help="write the figures as JSON")
    ] = None,
    check: Annotated[
        bool, Parameter(help="compare with the bars for Llama-3.1-8B on an H100 or H200; 1 if one is missed")
    ] = False,
) -> int:
    """Measure prefill by length and decode steps by batch and context, without a server."""
    planned = offline_work(work)
    if output is not None:
        check_output_path(output, "--output")
    options = engine_options(engine)

    from phloem.shared.engine.offline.bench import run_offline  # it imports torch

    console = Console()
    report = run_offline(options, planned, lambda what: console.print(f"[dim]{what}[/dim]"))
    print_report(report, console)
    if output is not None:
        write_output(output, msgspec.json.format(msgspec.json.encode(report)))
    return print_bars(report, console) if check else 0
