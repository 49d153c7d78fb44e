"""One prefill and one decode worker beside a unified one, over HTTP: the table of KV transfer.

    python benchmarks/bench_pair.py [--check] [-o pair.json]          # two GPUs, about four minutes
    python benchmarks/bench_pair.py --device cpu                      # a tiny model, to try it

Starts the clusters itself, in turn, with `phloem up`, and loads them with the library of `phloem bench
serve`. The prompts share nothing. "While prompts come" is the decode worker's ITL with 32 streams running,
from the moment when all of them have begun to when the first has ended, alone and with a second client that
sends long prompts one after another; the two take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from benchmarks.pair.clusters import cluster
from benchmarks.pair.loads import Loads, figure, finished, gaps_while_all_run
from benchmarks.pair.tables import OpenLoop, Table, cpu_table, gpu_table
from phloem.cli.up.devices import count_gpus
from phloem.shared.bench.bars import Bar, all_met, bar_lines
from phloem.shared.bench.options import LoadOptions
from phloem.shared.bench.result import RunResult
from phloem.shared.bench.statistics import Summary, summarize
from phloem.shared.errors import PhloemError


async def long_prompts(loads: Loads, table: Table) -> RunResult:
    load = LoadOptions(concurrency=1, num_prompts=table.num_long, warmup_requests=2)
    return await loads.run("long prompts, one at a time", table.long_tokens, 32, load)


async def streams_alone_and_beside(loads: Loads, table: Table) -> tuple[list[Summary], list[Summary]]:
    """ITL while all streams run: without and with the second client, in turns."""
    found: dict[bool, list[Summary]] = {False: [], True: []}
    load = LoadOptions(concurrency=table.streams, num_prompts=table.streams, warmup_requests=0)
    for number in range(table.rounds):
        for beside in (False, True) if number % 2 == 0 else (True, False):
            what = f"{table.streams} streams, {'with' if beside else 'without'} long prompts, {number + 1}"
            streams = loads.controller(table.stream_input, table.stream_output, load)
            if beside:
                result = await loads.run_beside(what, streams)
            else:
                result = loads.keep(what, await finished(what, streams.run()))
            summary = summarize(gaps_while_all_run(result.targets[0].records))
            if summary is None:
                raise PhloemError("bench_failed", f"{what}: the streams never ran together")
            found[beside].append(summary)
    return found[False], found[True]


def stream_bars(alone: list[Summary], beside: list[Summary], table: Table) -> list[Bar]:
    bound = 1.25 if table.is_judged else None
    ratios = sorted(b.p99 / a.p99 for a, b in zip(alone, beside, strict=True))
    name = f"ITL p99, {table.streams} streams"
    return [
        Bar(f"{name}, alone", max(item.p99 for item in alone), "ms"),
        Bar(f"{name}, while {table.long_tokens}-token prompts come", max(b.p99 for b in beside), "ms"),
        Bar(f"{name}, with / without (worst of {len(ratios)})", ratios[-1], "x", bound),
        Bar(f"ITL median, {table.streams} streams, alone", alone[0].median, "ms"),
        Bar(f"ITL median, {table.streams} streams, while prompts come", beside[0].median, "ms"),
    ]


def gap_bars(result: RunResult, table: Table) -> list[Bar]:
    """The client's view of the hand-over, prompts one at a time."""
    itl, gap = figure(result, "median_itl_ms"), figure(result, "median_first_gap_ms")
    bound = 2 * itl + 6.0
    return [
        Bar("steady ITL, median", itl, "ms"),
        Bar(
            f"token 0 to 1, {table.long_tokens} tokens, median", gap, "ms", bound if table.is_judged else None
        ),
        Bar(f"token 0 to 1, {table.long_tokens} tokens, max", figure(result, "max_first_gap_ms"), "ms"),
    ]


def open_loop_bars(result: RunResult, loop: OpenLoop) -> list[Bar]:
    name = f"{loop.input_tokens}/{loop.output_tokens} at {loop.rate:g} req/s"
    bounds = {
        "p99_itl_ms": ("ITL p99", loop.max_itl_p99_ms),
        "median_tpot_ms": ("TPOT p50", loop.max_tpot_p50_ms),
        "median_ttft_ms": ("TTFT p50", loop.max_ttft_p50_ms),
        "p99_ttft_ms": ("TTFT p99", 0.0),
        "median_first_gap_ms": ("token 0 to 1 p50", 0.0),
        "p99_first_gap_ms": ("token 0 to 1 p99", 0.0),
    }
    return [
        Bar(f"{name}: {what}", figure(result, key), "ms", bound or None)
        for key, (what, bound) in bounds.items()
    ]


async def measure_pair(loads: Loads, table: Table, bars: list[Bar]) -> float:
    """Everything that wants the pair; the median TTFT of long prompts."""
    long = await long_prompts(loads, table)
    bars += gap_bars(long, table)
    bars += stream_bars(*await streams_alone_and_beside(loads, table), table)
    for loop in table.open_loops:
        load = LoadOptions(
            first_rate=loop.rate, last_rate=loop.rate, num_prompts=loop.num_prompts, warmup_requests=2
        )
        name = f"{loop.input_tokens}/{loop.output_tokens}"
        bars += open_loop_bars(await loads.run(name, loop.input_tokens, loop.output_tokens, load), loop)
    return figure(long, "median_ttft_ms")


async def measure(table: Table, folder: Path, bars: list[Bar]) -> dict[str, RunResult]:
    """Fills `bars` as it goes, so that a failure shows what was found before it."""
    pair_roles, unified_roles = ("--prefill", "1", "--decode", "1"), ("--prefill", "0", "--decode", "0")
    async with cluster(table, "pair", pair_roles, folder) as url:
        pair = Loads(table, "pair", url)
        pair_ttft = await measure_pair(pair, table, bars)
    async with cluster(table, "unified", (*unified_roles, "--unified", "1"), folder) as url:
        unified = Loads(table, "unified", url)
        ttft = figure(await long_prompts(unified, table), "median_ttft_ms")
    name = f"TTFT p50, {table.long_tokens} tokens"
    bars += [
        Bar(f"{name}, 1P1D", pair_ttft, "ms"),
        Bar(f"{name}, unified", ttft, "ms"),
        Bar(f"{name}, 1P1D / unified", pair_ttft / ttft, "x", 1.03 if table.is_judged else None),
    ]
    return pair.runs | {f"unified: {what}": run for what, run in unified.runs.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a bar is missed")
    parser.add_argument("--output", "-o", type=Path, help="bars and all requests as JSON")
    arguments = parser.parse_args(argv)
    cuda = arguments.device == "cuda" or (arguments.device == "auto" and count_gpus(os.environ) >= 2)
    began_s, bars, failed = time.monotonic(), list[Bar](), False
    runs: dict[str, RunResult] = {}
    with tempfile.TemporaryDirectory(prefix="phloem-pair-") as name:
        table = gpu_table() if cuda else cpu_table(Path(name))
        try:
            runs = asyncio.run(measure(table, Path(name), bars))
        except PhloemError as error:
            print(f"FAILED: {error}")
            failed = True
    print("\n".join(bar_lines(bars)))
    print(f"pair: {time.monotonic() - began_s:.0f} s")
    if arguments.output is not None:
        report = {"table": table, "bars": bars, "runs": runs}
        arguments.output.write_bytes(msgspec.json.encode(report))
    return 1 if failed or (arguments.check and not all_met(bars)) else 0


if __name__ == "__main__":
    sys.exit(main())
