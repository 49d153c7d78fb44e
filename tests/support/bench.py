"""Running a benchmark from a test, against the server with known delays."""

from __future__ import annotations

import json
import urllib.request
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
