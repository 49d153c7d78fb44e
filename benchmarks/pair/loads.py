"""Loads on one cluster, and what their runs say."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Sequence

from benchmarks.pair.tables import Table
from phloem.shared.bench.controller import Controller
from phloem.shared.bench.datasets.options import DatasetOptions
from phloem.shared.bench.lengths import LengthRange
from phloem.shared.bench.options import LoadOptions, RunOptions
from phloem.shared.bench.protocol import TargetSpec, Tick
from phloem.shared.bench.result import RunResult, SavedRecord
from phloem.shared.errors import PhloemError

_BESIDE_TIMEOUT_S = 60.0  # until the second client's first answer
_REQUEST_TIMEOUT_S = 60.0
_LOAD_TIMEOUT_S = 150.0  # the longest takes 25 s; a cluster that hangs would cost a request's timeout each
_LAG_LIMIT_MS = 5.0  # the client's own; over it the run says that its figures are coarse


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
            timeout_s=_REQUEST_TIMEOUT_S,
        )
        return Controller(options, watcher or Begun(), sys.argv)

    async def run(self, what: str, input_tokens: int, output_tokens: int, load: LoadOptions) -> RunResult:
        """Raises `PhloemError` when a request failed, or it does not end."""
        return self.keep(what, await finished(what, self.controller(input_tokens, output_tokens, load).run()))

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
            result = await finished(what, streams.run())
        except TimeoutError as error:
            raise PhloemError("bench_failed", f"{what}: no answer to a long prompt in time") from error
        finally:
            others.stop()
            other = await finished(f"{what}: the others", beside)
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


async def finished(what: str, load: Awaitable[RunResult]) -> RunResult:
    """Its result. Raises `PhloemError` when it does not end; it is cancelled then."""
    try:
        async with asyncio.timeout(_LOAD_TIMEOUT_S):
            return await load
    except TimeoutError as error:
        raise PhloemError("bench_failed", f"{what}: not over after {_LOAD_TIMEOUT_S:.0f} s") from error


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
