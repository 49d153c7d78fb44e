"""The host's work per decode step of a real engine on a GPU: its own parts, and each call into CUDA."""

from __future__ import annotations

import gc
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.host_step.stopwatch import Stopwatch
from benchmarks.host_step.turns import NOTING, Turns
from phloem.shared.engine.assembly import build_engine
from phloem.shared.engine.config import EngineConfig, EngineOptions
from phloem.shared.engine.cuda_runner import CudaStepRunner
from phloem.shared.engine.engine_loop import Engine
from phloem.shared.engine.offline.driver import Driver
from phloem.shared.engine.step_runner import StepRunner
from phloem.shared.model_store.model_config import load_model_config

STEPS = 48  # per round


class Line(NamedTuple):
    """One part: microseconds of the median call, calls per step, microseconds per step."""

    part: str
    median_us: float
    calls: float
    step_us: float


class Breakdown(NamedTuple):
    """total_us: of the median step, without stopwatches inside; wall_us: with the device's time."""

    total_us: float
    mean_us: float
    wall_us: float
    lines: list[Line]


def measure_on_gpu(model_path: str, batch: int, context: int, rounds: int) -> Breakdown:
    """A model of `model_path`'s shape with random weights, `batch` greedy rows that decode."""
    driver = Driver(load_model_config(Path(model_path)).vocab_size)
    runners: list[StepRunner] = []

    def keep(runner: StepRunner, device: torch.device) -> StepRunner:
        runners.append(runner)
        return runner

    options = EngineOptions(
        model_path=model_path,
        load_format="dummy",
        dtype="bfloat16",
        device="cuda",
        context_length=32_768,
        mem_fraction_static=0.85,
        max_mixed_prefill_tokens=1 << 20,
    )
    config = EngineConfig(
        worker_id="host-step", epoch=1, role="unified", host="127.0.0.1", cluster_secret=b"", options=options
    )
    engine, _, endpoint = build_engine(config, driver.receive, keep)
    gc.collect()
    gc.freeze()  # as the engine's own process does
    try:
        driver.attach(engine)
        driver.start_batch(batch, context, (rounds + 4) * STEPS, staggered=True)
        driver.run_until(lambda: driver.full_steps(batch) >= 8)
        runner = runners[0]
        assert isinstance(runner, CudaStepRunner)
        return break_down(engine, runner, driver, batch, rounds)
    finally:
        engine.close()
        endpoint.close()


def break_down(engine: Engine, runner: CudaStepRunner, driver: Driver, batch: int, rounds: int) -> Breakdown:
    """Of an engine whose `batch` rows all decode."""
    turns = Turns(engine, driver, Stopwatch(time.perf_counter))
    steps = turns.steps(rounds * STEPS)
    own_us = [step.own_us for step in steps]
    parts = Stopwatch(time.perf_counter)
    parts.around(driver, "note", NOTING)
    _watch_engine(parts, engine)
    _watch_cuda(parts, runner, batch)
    watched_us = statistics.mean(step.own_us for step in turns.steps(STEPS))
    lines = [
        Line(part, 1e6 * parts.median(part), len(calls) / STEPS, 1e6 * parts.total(part) / STEPS)
        for part, calls in parts.calls.items()
        if part != NOTING
    ]
    rest_us = watched_us - sum(line.step_us for line in lines)
    lines.append(Line("the loop itself", rest_us, 1.0, rest_us))
    wall_us = statistics.median(step.all_us for step in steps)
    return Breakdown(statistics.median(own_us), statistics.mean(own_us), wall_us, lines)


def show_breakdown(found: Breakdown, batch: int, context: int) -> None:
    print(f"host work of a decode step, {batch} x {context}, us{'':12s}median call   calls    a step")
    for line in found.lines:
        print(f"  {line.part:50s}{line.median_us:10.1f}{line.calls:8.2f}{line.step_us:10.1f}")
    print(
        f"all, without stopwatches inside: median {found.total_us:.0f} us, mean {found.mean_us:.0f} us; "
        f"the step takes {found.wall_us:.0f} us"
    )


def _watch_engine(watch: Stopwatch, engine: Engine) -> None:
    watch.around(engine._scheduler, "schedule", "schedule")
    watch.around(engine._scheduler, "collect", "collect")
    watch.around(engine._outbox, "tokens", "outbox: tokens")
    watch.around(engine._outbox, "flush", "outbox: report, encoded")
    watch.around(engine._status, "load", "load report")


def _watch_cuda(watch: Stopwatch, runner: CudaStepRunner, batch: int) -> None:
    inputs, results = runner._inputs, runner._results
    watch.around(runner, "launch", "launch, what is not below")
    watch.around(inputs, "_fill_rows", "inputs: rows")
    if inputs._tables is not None:
        watch.around(inputs._tables, "write", "inputs: new pages, key shares")
    watch.around(inputs._rows._ring, "_send", "CUDA: upload, one copy")
    watch.around(runner._graphs[batch], "replay", "CUDA: launch of the graph, sampling in it")
    watch.around(results, "launched", "CUDA: event, record")
    watch.around(results, "wait", "download: tokens from pinned memory")
