"""Running a benchmark from a test, against the server with known delays."""

from __future__ import annotations

import itertools
import json
import urllib.request
from collections.abc import Sequence
from typing import Any

import msgspec

from phloem.shared.bench.controller import Controller
from phloem.shared.bench.datasets.options import DatasetOptions
from phloem.shared.bench.lengths import LengthRange
from phloem.shared.bench.options import LoadOptions, RunOptions
from phloem.shared.bench.protocol import ApiName, TargetSpec, Tick
from phloem.shared.bench.result import RunResult

NO_LIMIT_MS = 1e9


class SilentWatcher:
    """Remembers the phases."""

    def __init__(self) -> None:
        self.phases: list[str] = []

    def phase(self, text: str, num_requests: int) -> None:
        self.phases.append(text)

    def tick(self, tick: Tick) -> None:
        pass


def delay_target(url: str, *, name: str = "t", api: ApiName = "completions", **delay: object) -> TargetSpec:
    """A target that behaves as `delay` says (see `Delay`)."""
    extra = msgspec.json.encode({"delay": delay})[1:-1]
    return TargetSpec(name=name, url=url, api=api, extra_body=extra)


# Any: options by name, checked by the struct's own constructor below.
def bench_options(*targets: TargetSpec, **changes: Any) -> RunOptions:
    """Ten prompts of 16 tokens, 8 tokens each, one after the other; `changes` replace options."""
    options = RunOptions(
        targets=targets,
        dataset=DatasetOptions(input_lengths=LengthRange(16, 16), output_lengths=LengthRange(8, 8)),
        load=LoadOptions(concurrency=1, num_prompts=10),
        prompt_kind="messages" if targets[0].api == "chat" else "tokens",
        max_lag_ms=NO_LIMIT_MS,
    )
    return msgspec.structs.replace(options, **changes)


async def run_bench(options: RunOptions, watcher: SilentWatcher | None = None) -> RunResult:
    return await Controller(options, watcher or SilentWatcher(), ["phloem", "bench", "serve"]).run()


def server_log(url: str) -> dict[str, dict[str, Any]]:
    """What the server did, by request id."""
    with urllib.request.urlopen(f"{url}/log") as response:
        log: dict[str, dict[str, Any]] = json.load(response)
    return log


# Any: entries of the server's log.
def true_latencies(entries: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """The figures' values in ms by the server's own clock."""
    values: dict[str, list[float]] = {"ttft": [], "itl": [], "tpot": [], "e2e_latency": []}
    for entry in entries:
        start, writes = entry["received_s"], entry["writes_s"]
        values["ttft"].append((writes[0] - start) * 1e3)
        values["itl"] += [(later - earlier) * 1e3 for earlier, later in itertools.pairwise(writes)]
        values["tpot"].append((writes[-1] - writes[0]) / (len(writes) - 1) * 1e3)
        values["e2e_latency"].append((writes[-1] - start) * 1e3)
    return values
