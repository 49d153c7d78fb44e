"""`phloem bench serve`: loads servers and tells TTFT, ITL and all that."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Sequence

import uvloop
from rich.console import Console

from phloem.cli.bench.comparison_table import print_comparison
from phloem.cli.bench.flags import (
    DatasetFlags,
    LoadFlags,
    OutputFlags,
    TargetFlags,
    VerdictFlags,
    run_options,
)
from phloem.cli.bench.live import live_view
from phloem.cli.bench.table import print_result
from phloem.shared.bench.comparison import compare_targets
from phloem.shared.bench.controller import Controller, Watcher
from phloem.shared.bench.options import RunOptions
from phloem.shared.bench.output_path import check_output_path
from phloem.shared.bench.plot import check_plot_path, write_plot
from phloem.shared.bench.result import RunResult, write_result

EXIT_INVALID = 3
_INTERRUPTED = 130
_SECRET_FLAGS = ("--api-key",)


def serve(
    *,
    targets: TargetFlags = TargetFlags(),  # noqa: B008 - frozen
    data: DatasetFlags = DatasetFlags(),  # noqa: B008
    load: LoadFlags = LoadFlags(),  # noqa: B008
    verdict: VerdictFlags = VerdictFlags(),  # noqa: B008
    output: OutputFlags = OutputFlags(),  # noqa: B008
) -> int:
    """Measure OpenAI-compatible servers. Exits with 3 when the run is invalid: failures, or own lag."""
    options = run_options(targets, data, load, verdict, output)
    if output.output is not None:
        check_output_path(output.output, "--output")
    if output.plot is not None:
        check_plot_path(output.plot)
    console = Console(highlight=False)
    with (
        live_view(Console(stderr=True, highlight=False)) as view,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        result = runner.run(_run(options, view))
    print_result(result, console)
    if len(result.targets) > 1:
        for other in result.targets[1:]:
            console.print()
            print_comparison(compare_targets(result, result.targets[0], result, other), console)
    if output.output is not None:
        write_result(result, output.output)
    if output.plot is not None:
        write_plot(result, output.plot)
    if result.is_interrupted:
        return _INTERRUPTED
    return 0 if result.is_valid else EXIT_INVALID


async def _run(options: RunOptions, watcher: Watcher) -> RunResult:
    """Ctrl-C ends the run early and keeps what was measured."""
    controller = Controller(options, watcher, hide_secrets(sys.argv))
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, controller.stop)
    try:
        return await controller.run()
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def hide_secrets(argv: Sequence[str]) -> list[str]:
    """The command line as it may be recorded."""
    shown: list[str] = []
    for word in argv:
        flag, separator, _ = word.partition("=")
        if shown and shown[-1] in _SECRET_FLAGS:
            word = "***"
        elif flag in _SECRET_FLAGS and separator:
            word = f"{flag}=***"
        shown.append(word)
    return shown
