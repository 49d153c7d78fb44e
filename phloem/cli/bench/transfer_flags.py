"""The flags of `phloem bench transfer`, and the run's options made of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Group, Parameter

from phloem.shared.errors import ConfigError
from phloem.shared.transfer_bench.models import ModelShape, write_model

if TYPE_CHECKING:  # it imports torch
    from phloem.shared.transfer_bench.run import TransferOptions

_SIZES_GPU, _SIZES_CPU = "1,4,16,64,256,512,1024", "1,4,16"
_GPUS = "0,1"
_PROMPTS_GPU, _PROMPTS_CPU = "1024,8192", "64,256"

_PAIR = Group("Pair", sort_key=1)
_WORK = Group("Work", sort_key=2)
_CHANNEL = Group("Channel", sort_key=3)


@Parameter(name="*", group=_PAIR)
@dataclass(frozen=True, kw_only=True)
class PairFlags:
    """Which two devices, and whose KV."""

    device: Annotated[
        Literal["auto", "cuda", "cpu"],
        Parameter(help="cuda: two GPUs over NCCL; cpu: two processes over Gloo"),
    ] = "auto"
    gpus: Annotated[
        str | None, Parameter(help=f"numbers of the prefill and the decode GPU [default: {_GPUS}]")
    ] = None
    model_path: Annotated[
        Path | None, Parameter(help="directory with a config.json [default: --model-shape]")
    ] = None
    model_shape: Annotated[
        ModelShape | None, Parameter(help="[default: llama-3.1-8b on GPUs, tiny on a CPU]")
    ] = None
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"], Parameter(help="auto: bfloat16 on GPUs, else float32")
    ] = "auto"


@Parameter(name="*", group=_WORK)
@dataclass(frozen=True, kw_only=True)
class WorkFlags:
    """What is moved and computed."""

    sizes: Annotated[str | None, Parameter(help=f"MiB, with commas; '' for none [default: {_SIZES_GPU}]")] = (
        None
    )
    prompts: Annotated[
        str | None, Parameter(help=f"tokens; slow-downs with the last; '' for none [default: {_PROMPTS_GPU}]")
    ] = None
    running: Annotated[int, Parameter(help="requests that decode meanwhile; 0: 32 on GPUs, else 4")] = 0
    rounds: Annotated[int, Parameter(help="of everything that is compared")] = 5
    window_s: Annotated[float, Parameter(help="seconds of each round of decode")] = 3.0


@Parameter(name="*", group=_CHANNEL)
@dataclass(frozen=True, kw_only=True)
class ChannelFlags:
    """How it is moved."""

    staging_mib: Annotated[int, Parameter(help="size of a staging slot; 0: the product's default")] = 0
    staging_slots: Annotated[int, Parameter(help="0: the product's default")] = 0
    max_ctas: Annotated[int, Parameter(help="bound on NCCL's CTAs; 0: the default")] = 0


def transfer_options(
    pair: PairFlags, work: WorkFlags, channel: ChannelFlags, *, num_gpus: int, folder: Path
) -> TransferOptions:
    """The model's shape and the processes' logs go to `folder`. Raises `ConfigError`."""
    from phloem.shared.transfer_bench.run import TransferOptions, parse_sizes

    gpus = gpus_of(pair.device, pair.gpus, num_gpus)
    cuda = gpus is not None
    shape = pair.model_shape or ("llama-3.1-8b" if cuda else "tiny")
    return TransferOptions(
        model_dir=str(pair.model_path or write_model(shape, folder / "model")),
        dtype=pair.dtype if pair.dtype != "auto" else ("bfloat16" if cuda else "float32"),
        gpus=gpus,
        sizes=parse_sizes((_SIZES_GPU if cuda else _SIZES_CPU) if work.sizes is None else work.sizes),
        prompts=_lengths((_PROMPTS_GPU if cuda else _PROMPTS_CPU) if work.prompts is None else work.prompts),
        context_length=0 if pair.model_path is None else 16384,
        hand_overs=8 if cuda else 3,
        rounds=max(2, work.rounds),
        running=work.running or (32 if cuda else 4),
        context=1024 if cuda else 64,
        window_s=work.window_s,
        staging_bytes=channel.staging_mib * 2**20,
        staging_slots=channel.staging_slots,
        max_ctas=channel.max_ctas,
        ahead_bytes=2**31 if cuda else 2**26,
        log_dir=str(folder),
    )


def gpus_of(device: str, named: str | None, num_gpus: int) -> tuple[int, int] | None:
    """The pair of GPUs, `named` or the first two, or None for a CPU, which is measured only when no GPUs are
    named. Raises `ConfigError`."""
    if device == "cpu" and named is not None:
        raise ConfigError(f"--gpus {named} and --device cpu: give one of them", param="gpus")
    if device == "cpu" or (device == "auto" and named is None and num_gpus == 0):
        return None
    text = _GPUS if named is None else named
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
