"""`phloem simulate`: a trace through the cluster's own routing and scheduling, on this CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from cyclopts import Group, Parameter
from rich.console import Console

from phloem.shared.errors import ConfigError
from phloem.simulate.bars import Check, check, ideal_hit_rates
from phloem.simulate.options import ClusterShape, Delays, SimulationOptions, StepModel
from phloem.simulate.plot import check_plot_path, write_plot
from phloem.simulate.result import SimulationResult
from phloem.simulate.study import run_all
from phloem.simulate.table import print_bars, print_ideal, print_results
from phloem.simulate.workload import SimRequest, load_trace, shared_prefix, spread_ticks

EXIT_MISSED = 1
TABLE_WIDTH = 120  # in a file or a pipe

Picked = TypeVar("Picked", bound=msgspec.Struct)

_WORKLOAD = Group("Workload", sort_key=1)
_CLUSTER = Group("Cluster", sort_key=2)
_MODEL = Group("Modelled device", sort_key=3)
_OUTPUT = Group("Output", sort_key=4)

_STEPS = StepModel()
_DELAYS = Delays()


@Parameter(name="*", group=_WORKLOAD)
@dataclass(frozen=True, kw_only=True)
class WorkloadFlags:
    """What arrives. Without a trace: the workload where one prefix takes half of the requests."""

    num_requests: Annotated[int, Parameter(help="the first ones of the trace; 0: all (12,000 without)")] = 0
    rate_scale: Annotated[float, Parameter(help="divides a trace's gaps: 2 is twice the load")] = 1.0
    spread_ticks: Annotated[
        bool, Parameter(help="a trace's equal times are ticks of its clock: spread them until the next")
    ] = True
    rate: Annotated[float, Parameter(help="shared prefix: requests per second")] = 80.0
    prefix_len: Annotated[int, Parameter(help="shared prefix: tokens")] = 4096
    prefix_share: Annotated[float, Parameter(help="shared prefix: share of requests that have it")] = 0.5
    seed: int = 0


@Parameter(name="*", group=_CLUSTER)
@dataclass(frozen=True, kw_only=True)
class ClusterFlags:
    """Who serves it."""

    policies: Annotated[str, Parameter(help="routing policies, with commas")] = (
        "cost,cache_aware,least_loaded,round_robin,random"
    )
    gateways: Annotated[int, Parameter(help="gateways; each knows only its own requests at once")] = 1
    prefill: Annotated[int, Parameter(help="prefill workers")] = 8
    decode: Annotated[int, Parameter(help="decode workers")] = 8
    unified: Annotated[int, Parameter(help="unified workers")] = 0
    kv_tokens: Annotated[int, Parameter(help="KV memory of one worker, in tokens")] = 800_000
    page_tokens: Annotated[int, Parameter(help="tokens per KV page: 1 to 64 (powers of 2) x --grain")] = 512
    chunk_tokens: Annotated[int, Parameter(help="most tokens of one engine step")] = 8192
    max_running: Annotated[int, Parameter(help="requests with a slot on one worker")] = 256
    grain: Annotated[int, Parameter(help="tokens that the simulated engines treat as one; 1: exact")] = 8


@Parameter(name="*", group=_MODEL)
@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Times, in seconds; the defaults are Llama-3.1-8B in bfloat16 on one H200 (docs/measurements)."""

    prefill_fixed_s: Annotated[float, Parameter(help="of a step with prompt tokens")] = _STEPS.prefill_fixed_s
    prefill_token_s: Annotated[float, Parameter(help="per prompt token")] = _STEPS.prefill_token_s
    prefill_pair_s: Annotated[float, Parameter(help="per token and token before it")] = _STEPS.prefill_pair_s
    decode_fixed_s: Annotated[float, Parameter(help="of a decode step")] = _STEPS.decode_fixed_s
    decode_sequence_s: Annotated[float, Parameter(help="per running request")] = _STEPS.decode_sequence_s
    kv_read_bytes_per_s: Annotated[float, Parameter(help="KV read by attention")] = _STEPS.kv_read_bytes_per_s
    kv_bytes_per_token: Annotated[int, Parameter(help="size of a token's KV")] = _STEPS.kv_bytes_per_token
    transfer_bytes_per_s: Annotated[float, Parameter(help="KV sent by one worker")] = (
        _DELAYS.transfer_bytes_per_s
    )
    transfer_latency_s: Annotated[float, Parameter(help="of the last piece")] = _DELAYS.transfer_latency_s
    publish_s: Annotated[float, Parameter(help="from a tree's change to look-ups")] = _DELAYS.publish_s
    lookup_s: Annotated[float, Parameter(help="of a look-up in the index")] = _DELAYS.lookup_s
    announce_ttl_s: Annotated[float, Parameter(help="of announced placements; 0: none")] = (
        _DELAYS.announce_ttl_s
    )
    tell_s: Annotated[
        float, Parameter(help="workers tell gateways their load so often; 0: heartbeats only")
    ] = _DELAYS.tell_s
    heartbeat_s: Annotated[float, Parameter(help="between a worker's heartbeats")] = _DELAYS.heartbeat_s
    poll_s: Annotated[float, Parameter(help="between a gateway's looks at them")] = _DELAYS.poll_s


@Parameter(name="*", group=_OUTPUT)
@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    """What is told."""

    check: Annotated[
        bool, Parameter(negative="", help="find the load, measure the bars, exit with 1 on a miss")
    ] = False
    jobs: Annotated[int, Parameter(help="simulations at once; 0: one per core")] = 0
    output: Annotated[Path | None, Parameter(name=["--output", "-o"], help="all results as JSON")] = None
    plot: Annotated[Path | None, Parameter(help="distributions of TTFT, as .svg")] = None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON: every run with every TTFT; `check` when it was asked for."""

    workload: str
    ideal_hit_rates: dict[str, float]
    results: list[SimulationResult]
    check: Check | None = None


def simulate(
    trace: Annotated[
        Path | None, Parameter(help="a trace in Mooncake's (JSON lines) or Azure's (CSV) format")
    ] = None,
    /,
    *,
    workload: WorkloadFlags | None = None,
    cluster: ClusterFlags | None = None,
    model: ModelFlags | None = None,
    out: OutputFlags | None = None,
) -> int:
    """Replay a trace through the real routing, radix tree, KV pool and scheduler, with modelled devices."""
    workload, cluster = workload or WorkloadFlags(), cluster or ClusterFlags()
    model, out = model or ModelFlags(), out or OutputFlags()
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=TABLE_WIDTH)
    options = _options(workload, cluster, model)
    options.check()
    if out.plot is not None:
        check_plot_path(out.plot)
    requests = _requests(trace, workload)
    jobs = out.jobs or os.cpu_count() or 1
    if out.check:
        report = _check(requests, workload, options, jobs, console, trace)
    else:
        report = _compare(requests, cluster, options, jobs, console, trace)
    if out.output is not None:
        _write(out.output, report)
    if out.plot is not None:
        shown = report.check.at_load if report.check is not None else report.results
        write_plot(shown, f"phloem simulate {report.workload}", out.plot)
    wrong = any(result.problems for result in report.results)
    return EXIT_MISSED if wrong or (report.check is not None and not report.check.is_met) else 0


def _compare(
    requests: list[SimRequest],
    cluster: ClusterFlags,
    options: SimulationOptions,
    jobs: int,
    console: Console,
    trace: Path | None,
) -> Report:
    names = [name.strip() for name in cluster.policies.split(",") if name.strip()]
    runs = [msgspec.structs.replace(options, policy=name) for name in names]
    results = run_all(requests, runs, jobs=jobs, progress=_progress(console))
    ideal = ideal_hit_rates(requests, options)
    print_results(results, console)
    print_ideal(ideal, console)
    return Report(workload=_name(trace), ideal_hit_rates=ideal, results=results)


def _check(
    requests: list[SimRequest],
    workload: WorkloadFlags,
    options: SimulationOptions,
    jobs: int,
    console: Console,
    trace: Path | None,
) -> Report:
    if trace is None:
        raise ConfigError("--check needs a trace")
    shared = _shared_prefix(workload)
    checked = check(requests, shared, options, jobs=jobs, progress=_progress(console))
    print_results(checked.results, console)
    print_ideal(checked.ideal_hit_rates, console, checked.cost.hit_rate)
    print_bars(checked.bars, console)
    return Report(
        workload=_name(trace),
        ideal_hit_rates=checked.ideal_hit_rates,
        results=checked.results,
        check=checked,
    )


def _options(workload: WorkloadFlags, cluster: ClusterFlags, model: ModelFlags) -> SimulationOptions:
    return SimulationOptions(
        shape=ClusterShape(
            num_prefill=cluster.prefill,
            num_decode=cluster.decode,
            num_unified=cluster.unified,
            num_gateways=cluster.gateways,
            kv_tokens=cluster.kv_tokens,
            page_tokens=cluster.page_tokens,
            chunk_tokens=cluster.chunk_tokens,
            max_running=cluster.max_running,
            grain=cluster.grain,
        ),
        steps=_picked(StepModel, model),
        delays=_picked(Delays, model),
        rate_scale=workload.rate_scale,
        seed=workload.seed,
    )


def _picked(struct: type[Picked], flags: ModelFlags) -> Picked:
    """The struct made of the flags that have its fields' names; the rest are its defaults."""
    names = [name for name in struct.__struct_fields__ if hasattr(flags, name)]
    return struct(**{name: getattr(flags, name) for name in names})


def _requests(trace: Path | None, flags: WorkloadFlags) -> list[SimRequest]:
    if flags.num_requests < 0:
        raise ConfigError("--num-requests is 0, for all, or more")
    if trace is None:
        return _shared_prefix(flags)
    requests = load_trace(trace, max_requests=flags.num_requests)
    return spread_ticks(requests, flags.seed) if flags.spread_ticks else requests


def _shared_prefix(flags: WorkloadFlags) -> list[SimRequest]:
    if not flags.rate > 0 or flags.prefix_len < 0:
        raise ConfigError("--rate must be more than 0, and --prefix-len 0 or more")
    return shared_prefix(
        flags.num_requests or 12_000,
        rate=flags.rate,
        seed=flags.seed,
        prefix_tokens=flags.prefix_len,
        share=flags.prefix_share,
    )


def _name(trace: Path | None) -> str:
    return trace.name if trace is not None else "shared prefix"


def _progress(console: Console) -> Callable[[str], None]:
    return lambda line: console.print(line, style="dim", markup=False)


def _write(path: Path, report: Report) -> None:
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    except OSError as error:
        raise ConfigError(f"can't write {path}: {error.strerror}") from error
