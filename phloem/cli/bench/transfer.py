"""`phloem bench transfer`: KV from one device to another, beside the bare transport."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from phloem.cli.up.devices import count_gpus
from phloem.shared.bench.bars import Bar
from phloem.shared.errors import ConfigError
from phloem.shared.transfer_bench.models import ModelShape, write_model

if TYPE_CHECKING:
    from phloem.shared.transfer_bench.bandwidth import BandwidthReport
    from phloem.shared.transfer_bench.run import TransferReport

EXIT_MISSED = 1
_SIZES_GPU, _SIZES_CPU = "1,4,16,64,256,512,1024", "1,4,16"
_PROMPTS_GPU, _PROMPTS_CPU = "1024,8192", "64,256"


def transfer(
    *,
    device: Annotated[
        Literal["auto", "cuda", "cpu"],
        Parameter(help="cuda: two GPUs over NCCL; cpu: two processes over Gloo"),
    ] = "auto",
    gpus: Annotated[str, Parameter(help="numbers of the prefill and the decode GPU")] = "0,1",
    model_path: Annotated[
        Path | None, Parameter(help="directory with a config.json [default: --model-shape]")
    ] = None,
    model_shape: Annotated[
        ModelShape | None, Parameter(help="[default: llama-3.1-8b on GPUs, tiny on a CPU]")
    ] = None,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"], Parameter(help="auto: bfloat16 on GPUs, else float32")
    ] = "auto",
    sizes: Annotated[
        str | None, Parameter(help=f"MiB, with commas; '' for none [default: {_SIZES_GPU}]")
    ] = None,
    prompts: Annotated[
        str | None, Parameter(help=f"tokens; slow-downs with the last; '' for none [default: {_PROMPTS_GPU}]")
    ] = None,
    running: Annotated[int, Parameter(help="requests that decode meanwhile; 0: 32 on GPUs, else 4")] = 0,
    rounds: Annotated[int, Parameter(help="of everything that is compared")] = 5,
    window_s: Annotated[float, Parameter(help="seconds of each round of decode")] = 3.0,
    staging_mib: Annotated[int, Parameter(help="size of a staging slot; 0: the product's default")] = 0,
    staging_slots: Annotated[int, Parameter(help="0: the product's default")] = 0,
    max_ctas: Annotated[int, Parameter(help="bound on NCCL's CTAs; 0: the default")] = 0,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"], help="write it all as JSON")] = None,
    check: Annotated[bool, Parameter(help="exit with 1 when a bar is missed")] = False,
) -> int:
    """Measure KV transfer: bandwidth by size, exposed time per request, and what it costs others."""
    from phloem.shared.transfer_bench.run import TransferOptions, parse_sizes, run_transfer_bench

    pair = _gpus(device, gpus, count_gpus(os.environ))
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="phloem-bench-") as folder:
        shape = model_shape or ("tiny" if pair is None else "llama-3.1-8b")
        cuda = pair is not None
        options = TransferOptions(
            model_dir=str(model_path or write_model(shape, Path(folder) / "model")),
            dtype=dtype if dtype != "auto" else ("bfloat16" if cuda else "float32"),
            gpus=pair,
            sizes=parse_sizes((_SIZES_GPU if cuda else _SIZES_CPU) if sizes is None else sizes),
            prompts=_lengths((_PROMPTS_GPU if cuda else _PROMPTS_CPU) if prompts is None else prompts),
            context_length=0 if model_path is None else 16384,
            hand_overs=8 if cuda else 3,
            rounds=max(2, rounds),
            running=running or (32 if cuda else 4),
            context=1024 if cuda else 64,
            window_s=window_s,
            staging_bytes=staging_mib * 2**20,
            staging_slots=staging_slots,
            max_ctas=max_ctas,
            ahead_bytes=2**31 if cuda else 2**26,
            log_dir=folder,
        )
        try:
            report = run_transfer_bench(options, lambda text: console.print(f"[dim]{text}[/dim]"))
        except Exception:
            _print_logs(Path(folder), console)
            raise
    if output is not None:
        output.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    _print_report(report, console)
    return EXIT_MISSED if check and not report.holds else 0


def _gpus(device: str, text: str, num_gpus: int) -> tuple[int, int] | None:
    """The pair of GPUs, or None for a CPU. Raises `ConfigError`."""
    if device == "cpu" or (device == "auto" and num_gpus == 0):
        return None
    try:
        first, second = (int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--gpus {text!r} is not two numbers, as in 0,1", param="gpus") from None
    if first == second or not (0 <= first < num_gpus and 0 <= second < num_gpus):
        raise ConfigError(
            f"--gpus {text}: a transfer over NCCL needs two different GPUs, and this host has {num_gpus}. "
            "Measure the transport with --device cpu; one GPU serves with --prefill 0 --decode 0 --unified 1",
            param="gpus",
        )
    return first, second


def _lengths(text: str) -> tuple[int, ...]:
    lengths = [item.strip() for item in text.split(",") if item.strip()]
    if not all(item.isdigit() and int(item) > 1 for item in lengths):
        raise ConfigError(f"{text!r} is no list of prompt lengths: give numbers over 1, as in 1024,8192")
    return tuple(int(item) for item in lengths)


def _print_report(report: TransferReport, console: Console) -> None:
    if report.bandwidth is not None:
        _print_bandwidth(report.bandwidth, console)
    if report.exposed:
        _print_engines(report, console)
    table = Table("what", "value", "bar", "")
    for bar in report.bars:
        table.add_row(bar.what, f"{bar.value:.3f} {bar.unit}", bar.bound_text, _verdict(bar))
    console.print(table)


def _print_bandwidth(report: BandwidthReport, console: Console) -> None:
    console.print(
        f"{report.device}: pages of {report.page_bytes / 2**20:.3g} MiB, {report.staging_slots} staging "
        f"slots of {report.staging_bytes / 2**20:g} MiB, at most {report.max_ctas} CTAs; GB/s, medians"
    )
    table = Table("MiB", "raw", "pages", "ratio", "raw, ahead", "pages, ahead", "ratio, ahead")
    for size in report.sizes:
        table.add_row(
            f"{size.num_bytes / 2**20:g}",
            f"{size.raw:.2f}",
            _number(size.pages),
            _number(size.ratio),
            f"{size.raw_ahead:.2f}",
            _number(size.pages_ahead),
            _number(size.ratio_ahead),
        )
    console.print(table)


def _print_engines(report: TransferReport, console: Console) -> None:
    table = Table(
        "prompt", "MiB", "prefill ms", "token 0 to 1", "step", "beyond it", "exposed: median", "max"
    )
    for item in report.exposed:
        table.add_row(
            str(item.prompt_tokens),
            f"{item.num_bytes / 2**20:g}",
            f"{item.prefill_ms.median:.2f}",
            f"{item.first_gap_ms.median:.2f}",
            f"{item.step_ms:.2f}",
            f"{item.beyond_step_ms.median:.2f}",
            f"{item.exposed_ms.median:.2f}",
            f"{item.exposed_ms.max:.2f}",
        )
    console.print(table)
    table = Table("while KV moves", "without ms", "with ms", "slow-down", "KV moved GB/s")
    for slow in report.slow_downs:
        table.add_row(
            slow.what,
            f"{slow.without_ms:.3f}",
            f"{slow.with_ms:.3f}",
            f"{slow.ratio:.3f}",
            f"{slow.transfer_gb_per_s:.2f}",
        )
    console.print(table)


def _print_logs(folder: Path, console: Console) -> None:
    """The last lines of what the processes said: why they failed."""
    for path in sorted(folder.glob("*.log")):
        lines = path.read_text(errors="replace").splitlines()[-12:]
        console.print(f"== {path.name}", *lines, sep="\n", markup=False)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _verdict(bar: Bar) -> str:
    return f"[red]{bar.verdict}[/red]" if bar.verdict == "MISSED" else bar.verdict
