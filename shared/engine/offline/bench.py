"""The measurements of `phloem bench offline`, as values."""

from __future__ import annotations

import contextlib
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch

from phloem.shared.engine.assembly import build_engine
from phloem.shared.engine.config import EngineConfig, EngineOptions
from phloem.shared.engine.offline.ceilings import Ceilings, measure_ceilings
from phloem.shared.engine.offline.driver import Driver
from phloem.shared.engine.offline.fits import Room, check_fits
from phloem.shared.engine.offline.floors import ModelCost, decode_floor_s, model_cost, prefill_floor_s
from phloem.shared.engine.offline.made_up_tokenizer import with_tokenizer
from phloem.shared.engine.offline.timing import TimedRunner
from phloem.shared.engine.offline.work import DecodePlan, DecodeRun, OfflineWork
from phloem.shared.engine.runners import find_device, for_device
from phloem.shared.engine.sizing import context_length
from phloem.shared.engine.step_runner import StepRunner
from phloem.shared.engine.weights.loader import resolve_dtype
from phloem.shared.errors import PhloemError
from phloem.shared.model_store.model_config import ModelConfig, load_model_config
from phloem.shared.protocol.engine import EngineReady

_GPU_SHARE = 0.9  # nobody else needs the device meanwhile


class Measurement(msgspec.Struct, frozen=True):
    """One figure beside its floor, in milliseconds."""

    kind: str  # "prefill", "decode", "decode, grammars" (of a share of the rows) or "decode, sampled"
    batch: int
    tokens: int  # prompt length, or context at the first measured step
    measured_ms: float
    floor_ms: float
    p99_ms: float = 0.0
    host_ms: float = 0.0  # the host's own work per decode step: schedule, plan, launch, results
    idle_percent: float | None = None  # of the device between decode steps

    @property
    def ratio(self) -> float:
        return self.measured_ms / self.floor_ms


class OfflineReport(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a run found, and what it was asked; `start_s` is from when the engine is
    about to be built, all imported and the device in use, to ready."""

    model: str
    engine: EngineOptions
    work: OfflineWork
    device: str
    dtype: str
    torch_version: str
    read_gb_per_s: float
    matmul_tflops: float
    start_s: float
    measurements: list[Measurement]
    shape: tuple[int, ...] = ()  # `model_shape`'s


def model_shape(config: ModelConfig) -> tuple[int, ...]:
    """What tells one model's speed from another's: layers, hidden size, KV heads, head_dim, vocabulary."""
    return (
        config.num_layers,
        config.hidden_size,
        config.num_kv_heads,
        config.head_dim,
        config.vocab_size,
    )


def run_offline(options: EngineOptions, work: OfflineWork, progress: Callable[[str], None]) -> OfflineReport:
    """Measures ceilings, then prefill by length and decode by (batch, context).

    Raises `ConfigError` before the first measurement of the engine for what it can't hold.
    """
    if not work.grammar_share or options.load_format != "dummy":
        return _run(options, work, progress)
    with tempfile.TemporaryDirectory(prefix="phloem-bench-") as folder:
        model_dir = Path(options.model_path)
        vocab_size = load_model_config(model_dir).vocab_size
        spelling = str(with_tokenizer(model_dir, Path(folder), vocab_size))
        report = _run(msgspec.structs.replace(options, model_path=spelling), work, progress)
        engine = msgspec.structs.replace(report.engine, model_path=options.model_path)
        return msgspec.structs.replace(report, model=options.model_path, engine=engine)


class _Bench(NamedTuple):
    """An engine that is ready, and what its figures are compared with."""

    driver: Driver
    timer: TimedRunner
    cost: ModelCost
    ceilings: Ceilings
    chunk_tokens: int  # of an engine step


def with_gpu_share(options: EngineOptions, device: torch.device) -> EngineOptions:
    """The instrument's own `--mem-fraction-static` on a GPU, where none was given."""
    if device.type != "cuda" or options.mem_fraction_static:
        return options
    return msgspec.structs.replace(options, mem_fraction_static=_GPU_SHARE)


def _run(options: EngineOptions, work: OfflineWork, progress: Callable[[str], None]) -> OfflineReport:
    device = find_device(options.device)
    options = with_gpu_share(options, device)
    model_dir = Path(options.model_path)
    config = load_model_config(model_dir)
    dtype = resolve_dtype(options.dtype, model_dir, device)
    progress("ceilings")
    ceilings = measure_ceilings(device, dtype)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    progress("engine")
    began_s = time.perf_counter()
    with _built(options, Driver(config.vocab_size)) as (driver, timer, ready):
        start_s = time.perf_counter() - began_s
        chunk_tokens = for_device(options, device).chunked_prefill_size
        # The flag's, not `ready`'s: that is also bounded by the pool, and the remedy for the pool is another.
        context = context_length(options, config)
        check_fits(work, _room(ready, context, config.context_length, chunk_tokens))
        bench = _Bench(driver, timer, model_cost(config, dtype.itemsize), ceilings, chunk_tokens)
        measurements = list(_measure(bench, work, progress))
    return OfflineReport(
        model=options.model_path,
        engine=options,
        work=work,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        dtype=str(dtype),
        torch_version=str(torch.__version__),
        read_gb_per_s=ceilings.read_bytes_per_s / 1e9,
        matmul_tflops=ceilings.flops_per_s / 1e12,
        start_s=start_s,
        measurements=measurements,
        shape=model_shape(config),
    )


@contextlib.contextmanager
def _built(options: EngineOptions, driver: Driver) -> Iterator[tuple[Driver, TimedRunner, EngineReady]]:
    """A unified engine in this process, driven by `driver`; its runner's times, and what it has."""
    # Batches are static: their prompts need not be gentle with those that decode already, and none is shed.
    options = msgspec.structs.replace(
        options, max_mixed_prefill_tokens=1 << 20, max_queued_requests=1_000_000
    )
    timers: list[TimedRunner] = []

    def observe(runner: StepRunner, at: torch.device) -> StepRunner:
        timers.append(TimedRunner(runner, at))
        return timers[0]

    engine, ready, endpoint = build_engine(
        EngineConfig(
            worker_id="offline",
            epoch=1,
            role="unified",
            host="127.0.0.1",
            cluster_secret=b"",
            options=options,
        ),
        driver.receive,
        observe,
    )
    try:
        gc.collect()
        gc.freeze()  # as the engine's own process does
        driver.attach(engine)
        yield driver, timers[0], ready
    finally:
        engine.close()
        endpoint.close()


def _room(ready: EngineReady, context: int, model_context: int, chunk_tokens: int) -> Room:
    return Room(
        max_running_requests=ready.max_running_requests,
        context_length=context,
        model_context=model_context,
        page_size=ready.page_size,
        num_pages=ready.num_pages,
        chunk_tokens=chunk_tokens,
    )


def _measure(bench: _Bench, work: OfflineWork, progress: Callable[[str], None]) -> Iterator[Measurement]:
    if work.grammar_share:
        progress("grammar")
        progress(f"grammar ready after {bench.driver.prepare_grammar():.1f} s")
    for length in work.prefill:
        progress(f"prefill {length}")
        yield _prefill(bench, length)
    for run in work.decode_runs:
        progress(f"decode {run.batch} x {run.context}{run.kind.removeprefix('decode')}")
        yield _decode(bench, run)


def _prefill(bench: _Bench, length: int) -> Measurement:
    """From submission to the first token, one prompt at a time; the median of a few."""
    driver = bench.driver
    driver.run_batch(1, length, 1)
    times = [driver.timed(lambda: driver.run_batch(1, length, 1)) for _ in range(5)]
    floor_s = prefill_floor_s(bench.cost, bench.ceilings, length)
    return Measurement("prefill", 1, length, 1e3 * statistics.median(times), 1e3 * floor_s, 1e3 * max(times))


def _decode(bench: _Bench, run: DecodeRun) -> Measurement:
    """The median time between reports of full decode steps; the first few after prefill are left out.

    Prompts differ by a few tokens, so that rows need new pages in different steps, as in service. The host's
    work per step is the wall time of half of the steps less what was spent waiting, and on measuring.
    """
    driver, timer = bench.driver, bench.timer
    batch, num_steps = run.batch, run.num_steps
    plan = DecodePlan(batch, run.context, num_steps, bench.chunk_tokens)
    driver.start_batch(
        batch,
        plan.prompt_tokens,
        plan.new_tokens,
        sampling=run.sampling,
        staggered=True,
        grammar_share=run.grammar_share,
    )
    driver.run_until(lambda: driver.full_steps(batch) >= 4)
    timer.reset()
    driver.noting_s = 0.0
    began_s, before = time.perf_counter(), driver.full_steps(batch)
    driver.run_until(lambda: driver.full_steps(batch) >= before + num_steps // 2)
    host_s = time.perf_counter() - began_s - timer.waited_s - timer.marking_s - driver.noting_s
    num_launches, idle_percent = len(timer.launches), timer.idle_percent(batch)
    driver.run_until(lambda: False)
    gaps = driver.full_step_gaps(batch)[4:]
    if len(gaps) < max(1, num_steps // 4):
        raise PhloemError(
            "batch_not_whole",
            f"a batch of {batch} with {run.context} tokens each ran whole in {len(gaps)} steps only: raise "
            "--steps, or leave this shape out",
        )
    return Measurement(
        run.kind,
        batch,
        run.context,
        measured_ms=1e3 * statistics.median(gaps),
        floor_ms=1e3 * decode_floor_s(bench.cost, bench.ceilings, batch, run.context),
        p99_ms=1e3 * sorted(gaps)[min(len(gaps) - 1, int(0.99 * len(gaps)))],
        host_ms=1e3 * host_s / max(1, num_launches),
        idle_percent=idle_percent,
    )
