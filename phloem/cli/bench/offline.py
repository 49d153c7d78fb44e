"""`phloem bench offline`: the engine alone, static batches, each figure beside its floor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from phloem.shared.engine.config import AttentionBackend, DtypeName, EngineOptions, LoadFormat
from phloem.shared.errors import ConfigError, PhloemError

if TYPE_CHECKING:  # it imports torch
    from phloem.shared.engine.offline.bench import OfflineReport


def offline(
    *,
    model_path: Annotated[str, Parameter(help="model directory, GGUF, hub id or short name")],
    load_format: Annotated[
        LoadFormat, Parameter(help="dummy: random weights, config.json is enough")
    ] = "auto",
    device: Annotated[str, Parameter(help="auto, cpu, cuda or cuda:N")] = "auto",
    dtype: Annotated[DtypeName, Parameter(help="of weights and activations")] = "auto",
    attention_backend: Annotated[AttentionBackend, Parameter(help="attention kernels")] = "auto",
    mem_fraction_static: Annotated[float, Parameter(help="share of device memory for weights and KV")] = 0.9,
    context_length: Annotated[int, Parameter(help="longest prompt + output; 0: the model's own")] = 0,
    max_running_requests: Annotated[int, Parameter(help="slots; 0: the default")] = 0,
    prefill: Annotated[str, Parameter(help="prompt lengths, with commas")] = "512,1024,8192",
    decode: Annotated[str, Parameter(help="BATCHxCONTEXT, with commas")] = "1x1024,16x1024,64x1024",
    steps: Annotated[int, Parameter(help="decode steps per shape")] = 64,
    temperature: Annotated[float, Parameter(help="of the decode steps; 0 is greedy")] = 0.0,
    grammar_share: Annotated[
        float, Parameter(help="measure decode steps again with a grammar on this share of the rows, as 0.5")
    ] = 0.0,
    disable_cuda_graph: Annotated[bool, Parameter(help="run decode steps eagerly")] = False,
    disable_decode_kernels: Annotated[
        bool, Parameter(help="capture decode steps of the library's kernels instead of Phloem's own")
    ] = False,
    output: Annotated[Path | None, Parameter(help="write the figures as JSON")] = None,
    check: Annotated[
        bool, Parameter(help="compare with the bars for Llama-3.1-8B on an H100 or H200; 1 if one is missed")
    ] = False,
) -> int:
    """Measure prefill by length and decode steps by batch and context, without a server."""
    from phloem.shared.engine.offline.bench import run_offline

    console = Console()
    load_format = _load_format(model_path, load_format)
    options = EngineOptions(
        model_path=str(_resolve(model_path, load_format)),
        load_format=load_format,
        device=device,
        dtype=dtype,
        attention_backend=attention_backend,
        mem_fraction_static=mem_fraction_static,
        context_length=context_length,
        max_running_requests=max_running_requests,
        disable_cuda_graph=disable_cuda_graph,
        disable_decode_kernels=disable_decode_kernels,
    )
    report = run_offline(
        options,
        prefill_lengths=[_positive(item) for item in prefill.split(",") if item],
        decode_shapes=[_shape(item) for item in decode.split(",") if item],
        decode_steps=steps,
        temperature=temperature,
        grammar_share=_share(grammar_share),
        progress=lambda what: console.print(f"[dim]{what}[/dim]"),
    )
    if output is not None:
        output.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    console.print(
        f"{report.model} {report.dtype} on {report.device}: reads {report.read_gb_per_s:.0f} GB/s, "
        f"multiplies {report.matmul_tflops:.1f} TFLOP/s; ready after {report.start_s:.1f} s"
    )
    table = Table(
        "what", "batch", "tokens", "measured ms", "floor ms", "ratio", "p99 ms", "host ms", "idle %"
    )
    for row in report.measurements:
        table.add_row(
            row.kind,
            str(row.batch),
            str(row.tokens),
            f"{row.measured_ms:.2f}",
            f"{row.floor_ms:.2f}",
            f"{row.ratio:.2f}",
            f"{row.p99_ms:.2f}",
            f"{row.host_ms:.2f}" if row.host_ms else "",
            f"{row.idle_percent:.1f}" if row.idle_percent is not None else "",
        )
    console.print(table)
    return print_bars(report, console) if check else 0


def print_bars(report: OfflineReport, console: Console) -> int:
    """Each bar beside what this run has; the exit code."""
    from phloem.shared.engine.offline.bars import bars_of, measured_met, why_not_judged

    reason = why_not_judged(report.shape, report.dtype, report.device)
    if reason is not None:
        raise PhloemError("not_judged", f"--check: {reason}")
    bars = bars_of(report.measurements, report.start_s)
    table = Table("bar", "at most", "measured", "")
    for bar in bars:
        found = f"{bar.value:.2f} {bar.unit}" if bar.is_measured else "not measured"
        table.add_row(bar.what, f"{bar.bound:g} {bar.unit}", found, bar.verdict if bar.is_measured else "")
    console.print(table)
    return 0 if measured_met(bars) else 1


def _load_format(model_path: str, load_format: LoadFormat) -> LoadFormat:
    """A shape has no weights to load: random ones are meant."""
    from phloem.shared.model_store.shapes import is_shape

    return "dummy" if load_format == "auto" and is_shape(Path(model_path)) else load_format


def _resolve(model_path: str, load_format: str) -> Path:
    from phloem.shared.model_store.resolve import default_cache_dir, resolve_model

    need_weights = load_format != "dummy"
    return resolve_model(model_path, cache_dir=default_cache_dir(), need_weights=need_weights)


def _share(value: float) -> float:
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"--grammar-share {value} is no share: give a number from 0 to 1")
    return value


def _positive(text: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise ConfigError(f"{text!r} is not a number of tokens: give positive numbers, as in 512,1024")
    return int(text)


def _shape(text: str) -> tuple[int, int]:
    batch, separator, context = text.partition("x")
    if not separator:
        raise ConfigError(f"{text!r} is not BATCHxCONTEXT, as in 64x1024")
    return _positive(batch), _positive(context)
