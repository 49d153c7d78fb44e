"""`phloem bench offline`: the engine alone, static batches, each figure beside its floor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter
from rich.console import Console

from phloem.cli.bench.offline_flags import EngineFlags, WorkFlags, engine_options, offline_shapes
from phloem.cli.bench.offline_table import print_bars, print_report


def offline(
    *,
    engine: EngineFlags,
    work: WorkFlags = WorkFlags(),  # noqa: B008 - frozen
    output: Annotated[Path | None, Parameter(help="write the figures as JSON")] = None,
    check: Annotated[
        bool, Parameter(help="compare with the bars for Llama-3.1-8B on an H100 or H200; 1 if one is missed")
    ] = False,
) -> int:
    """Measure prefill by length and decode steps by batch and context, without a server."""
    from phloem.shared.engine.offline.bench import run_offline

    console = Console()
    shapes = offline_shapes(work)
    report = run_offline(
        engine_options(engine),
        prefill_lengths=shapes.prefill_lengths,
        decode_shapes=shapes.decode_shapes,
        decode_steps=shapes.decode_steps,
        temperature=work.temperature,
        grammar_share=shapes.grammar_share,
        progress=lambda what: console.print(f"[dim]{what}[/dim]"),
    )
    if output is not None:
        output.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    print_report(report, console)
    return print_bars(report, console) if check else 0
