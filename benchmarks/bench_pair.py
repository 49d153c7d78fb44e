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
import socket
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from phloem.cli.up.devices import count_gpus
from phloem.shared.bench.bars import Bar, all_met, bar_lines
from phloem.shared.bench.controller import Controller
from phloem.shared.bench.datasets.options import DatasetOptions
from phloem.shared.bench.lengths import LengthRange
from phloem.shared.bench.options import LoadOptions, RunOptions
from phloem.shared.bench.protocol import TargetSpec, Tick
from phloem.shared.bench.result import RunResult, SavedRecord
from phloem.shared.bench.statistics import Summary, summarize
from phloem.shared.errors import PhloemError
from phloem.shared.lifecycle.child_process import spawn_child
from phloem.shared.model_store.shapes import write_shape
from phloem.shared.transfer_bench.models import write_model

HOST = "127.0.0.1"
LLAMA = Path(__file__).parent / "models" / "llama-3.1-8b"
_START_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 60.0
_BESIDE_TIMEOUT_S = 60.0  # until the second client's first answer
_LAG_LIMIT_MS = 5.0  # the client's own; over it the run says that its figures are coarse


class OpenLoop(msgspec.Struct, frozen=True):
    """Poisson arrivals, and what they have to keep; 0: told, not judged."""

    input_tokens: int
    output_tokens: int
    rate: float
    num_prompts: int
    max_itl_p99_ms: float
    max_ttft_p50_ms: float
    max_tpot_p50_ms: float = 0.0


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """The sizes of everything; `is_judged` where the bars are meant for the hardware."""

    model: str
    up_flags: tuple[str, ...]
    token_ids: tuple[int, int]
    long_tokens: int
    num_long: int
    streams: int
    stream_input: int
    stream_output: int
    rounds: int
    open_loops: tuple[OpenLoop, ...]
    is_judged: bool


def gpu_table() -> Table:
    return Table(
        model=str(LLAMA),
        up_flags=("--load-format", "dummy", "--dtype", "bfloat16", "--context-length", "32768"),
        token_ids=(1000, 120_000),
        long_tokens=8192,
        num_long=10,
        streams=32,
        stream_input=1024,
        stream_output=800,
        rounds=2,
        open_loops=(
            OpenLoop(4096, 256, 4.0, 80, 9.0, 145.0, 5.6),
            OpenLoop(1024, 256, 16.0, 240, 10.0, 50.0),
        ),
        is_judged=True,
    )


def cpu_table(folder: Path) -> Table:
    shape = write_model("tiny", folder / "shape")
    write_shape((shape / "config.json").read_bytes(), folder / "tiny")
    return Table(
        model=str(folder / "tiny"),
        up_flags=("--load-format", "dummy", "--device", "cpu", "--context-length", "4096"),
        token_ids=(10, 250),
        long_tokens=256,
        num_long=4,
        streams=4,
        stream_input=32,
        stream_output=400,
        rounds=2,
        open_loops=(OpenLoop(128, 16, 2.0, 8, 0.0, 0.0),),
        is_judged=False,
    )


# -- clusters ----------------------------------------------------------------------------------------------


@asynccontextmanager
async def cluster(table: Table, name: str, roles: Sequence[str], folder: Path) -> AsyncIterator[str]:
    """A cluster by `phloem up`; gives its URL. Raises `PhloemError` with the end of its log."""
    with socket.create_server((HOST, 0)) as probe:
        port = probe.getsockname()[1]
    run_dir, log = folder / name, folder / f"{name}.log"
    command = [sys.executable, "-m", "phloem.cli.main", "up", "--no-ask", "--port", str(port), *roles]
    command += ["--model-path", table.model, *table.up_flags, "--run-dir", str(run_dir)]
    began_s = time.monotonic()
    with log.open("wb") as file:
        child = await spawn_child(name, command, stdout=file.fileno(), stderr=file.fileno())
    url = f"http://{HOST}:{port}"
    try:
        while not await asyncio.to_thread(answers, f"{url}/health_generate"):
            if child.returncode is not None or time.monotonic() - began_s > _START_TIMEOUT_S:
                raise PhloemError("bench_failed", f"{name} does not start:\n{tails(folder, name)}")
            await asyncio.sleep(0.1)
        print(f"{name}: ready after {time.monotonic() - began_s:.1f} s", flush=True)
        yield url
    except PhloemError:
        print(tails(folder, name))
        raise
    finally:
        await child.stop(_STOP_TIMEOUT_S)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def tails(folder: Path, name: str) -> str:
    """The last lines of every log of a cluster that are more than information."""
    parts = []
    for path in [folder / f"{name}.log", *sorted((folder / name).glob("*.log"))]:
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        parts += [f"== {path.name}", *[line for line in lines if " info " not in line][-6:]]
    return "\n".join(parts)


# -- loads -------------------------------------------------------------------------------------------------


class Begun:
    """A watcher that notes when the first request has ended."""

    def __init__(self) -> None:
        self.event = asyncio.Event()

    def phase(self, text: str, num_requests: int) -> None:
        pass

    def tick(self, tick: Tick) -> None:
        if tick.succeeded or tick.failed:
            self.event.set()


class Loads:
    """Runs loads on one target; no prompt comes twice."""

    def __init__(self, table: Table, name: str, url: str) -> None:
        self._table = table
        self._target = TargetSpec(name=name, url=url, api="completions")
        self._seed = 0
        self.runs: dict[str, RunResult] = {}

    def controller(
        self, input_tokens: int, output_tokens: int, load: LoadOptions, watcher: Begun | None = None
    ) -> Controller:
        self._seed += 1
        options = RunOptions(
            targets=(self._target,),
            dataset=DatasetOptions(
                input_lengths=LengthRange(input_tokens, input_tokens),
                output_lengths=LengthRange(output_tokens, output_tokens),
            ),
            load=load,
            prompt_kind="tokens",
            token_ids=self._table.token_ids,
            seed=1000 * len(self._target.name) + self._seed,
            max_lag_ms=_LAG_LIMIT_MS,
            timeout_s=120.0,
        )
        return Controller(options, watcher or Begun(), sys.argv)

    async def run(self, what: str, input_tokens: int, output_tokens: int, load: LoadOptions) -> RunResult:
        """Raises `PhloemError` when a request failed."""
        result = await self.controller(input_tokens, output_tokens, load).run()
        return self.keep(what, result)

    async def run_beside(self, what: str, streams: Controller) -> RunResult:
        """`streams`, while a second client sends long prompts one after another: from before the first token
        to after the last."""
        table, begun = self._table, Begun()
        endless = LoadOptions(concurrency=1, num_prompts=100_000, warmup_requests=0)
        others = self.controller(table.long_tokens, 2, endless, begun)
        beside = asyncio.create_task(others.run())
        try:
            async with asyncio.timeout(_BESIDE_TIMEOUT_S):
                await begun.event.wait()
            result = await streams.run()
        finally:
            others.stop()
            other = await beside
        self.keep(f"{what}: the others", other)
        return self.keep(what, result)

    def keep(self, what: str, result: RunResult) -> RunResult:
        """Remembers a run. Raises `PhloemError` when a request of it failed."""
        failed = [record.error for record in result.targets[0].records if record.error]
        if failed or not result.targets[0].records:
            raise PhloemError("bench_failed", f"{what}: {len(failed)} requests failed: {failed[:2]}")
        for problem in result.problems:
            print(f"  {what}: {problem}")
        self.runs[what] = result
        return result


def figure(result: RunResult, name: str) -> float:
    """A latency by its name; where it isn't known how many tokens a chunk has, the ITL is that of chunks."""
    figures = result.targets[0].figures
    value = figures.get(name, figures.get(name.replace("_itl_", "_chunk_itl_")))
    return float(value) if isinstance(value, int | float) else float("nan")


def gaps_while_all_run(records: Sequence[SavedRecord]) -> list[float]:
    """Milliseconds between tokens, from when every stream has begun to when the first one ends."""
    begin = max(1e3 * record.sent_s + record.chunk_ms[0] for record in records)
    end = min(1e3 * record.sent_s + record.chunk_ms[-1] for record in records)
    return [
        later - earlier
        for record in records
        for earlier, later in zip(record.chunk_ms, record.chunk_ms[1:], strict=False)
        if begin <= 1e3 * record.sent_s + earlier and 1e3 * record.sent_s + later <= end
    ]


# -- the table ---------------------------------------------------------------------------------------------


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
                result = loads.keep(what, await streams.run())
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
