"""The flags of `phloem bench offline`, and the engine and the work that they ask for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter
from msgspec import Struct

from phloem.shared.engine.config import AttentionBackend, DtypeName, EngineOptions, LoadFormat
from phloem.shared.errors import ConfigError

_ENGINE = Group("Engine", sort_key=1)
_WORK = Group("Work", sort_key=2)


@Parameter(name="*", group=_ENGINE)
@dataclass(frozen=True, kw_only=True)
class EngineFlags:
    """Which model, and how it runs."""

    model_path: Annotated[str, Parameter(help="model directory, GGUF, hub id or short name")]
    load_format: Annotated[LoadFormat, Parameter(help="dummy: random weights, config.json is enough")] = (
        "auto"
    )
    device: Annotated[str, Parameter(help="auto, cpu, cuda or cuda:N")] = "auto"
    dtype: Annotated[DtypeName, Parameter(help="of weights and activations")] = "auto"
    attention_backend: Annotated[AttentionBackend, Parameter(help="attention kernels")] = "auto"
    mem_fraction_static: Annotated[float, Parameter(help="share of device memory for weights and KV")] = 0.9
    context_length: Annotated[int, Parameter(help="longest prompt + output; 0: the model's own")] = 0
    max_running_requests: Annotated[int, Parameter(help="slots; 0: the default")] = 0
    disable_cuda_graph: Annotated[bool, Parameter(help="run decode steps eagerly")] = False
    disable_decode_kernels: Annotated[
        bool, Parameter(help="capture decode steps of the library's kernels instead of Phloem's own")
    ] = False


@Parameter(name="*", group=_WORK)
@dataclass(frozen=True, kw_only=True)
class WorkFlags:
    """What is measured."""

    prefill: Annotated[str, Parameter(help="prompt lengths, with commas")] = "512,1024,8192"
    decode: Annotated[str, Parameter(help="BATCHxCONTEXT, with commas")] = "1x1024,16x1024,64x1024"
    steps: Annotated[int, Parameter(help="decode steps per shape")] = 64
    temperature: Annotated[float, Parameter(help="of the decode steps; 0 is greedy")] = 0.0
    grammar_share: Annotated[
        float, Parameter(help="measure decode steps again with a grammar on this share of the rows, as 0.5")
    ] = 0.0


class OfflineShapes(Struct, frozen=True):
    """The flags of the work, checked: prompt lengths in tokens, and (batch, context in tokens)."""

    prefill_lengths: list[int]
    decode_shapes: list[tuple[int, int]]
    decode_steps: int
    grammar_share: float


def engine_options(flags: EngineFlags) -> EngineOptions:
    """With the model's directory, fetched when it isn't here. Raises `PhloemError`."""
    load_format = _load_format(flags)
    return EngineOptions(
        model_path=str(_resolved(flags.model_path, load_format)),
        load_format=load_format,
        device=flags.device,
        dtype=flags.dtype,
        attention_backend=flags.attention_backend,
        mem_fraction_static=flags.mem_fraction_static,
        context_length=flags.context_length,
        max_running_requests=flags.max_running_requests,
        disable_cuda_graph=flags.disable_cuda_graph,
        disable_decode_kernels=flags.disable_decode_kernels,
    )


def offline_shapes(flags: WorkFlags) -> OfflineShapes:
    """Raises `ConfigError` for what is no number, shape or share."""
    return OfflineShapes(
        prefill_lengths=[_positive(item, "--prefill") for item in flags.prefill.split(",") if item],
        decode_shapes=[_shape(item) for item in flags.decode.split(",") if item],
        decode_steps=_positive(str(flags.steps), "--steps"),
        grammar_share=_share(flags.grammar_share),
    )


def _load_format(flags: EngineFlags) -> LoadFormat:
    """A shape has no weights to load: random ones are meant."""
    from phloem.shared.model_store.shapes import is_shape

    is_auto = flags.load_format == "auto"
    return "dummy" if is_auto and is_shape(Path(flags.model_path)) else flags.load_format


def _resolved(model_path: str, load_format: LoadFormat) -> Path:
    from phloem.shared.model_store.resolve import default_cache_dir, resolve_model

    need_weights = load_format != "dummy"
    return resolve_model(model_path, cache_dir=default_cache_dir(), need_weights=need_weights)


def _share(value: float) -> float:
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"--grammar-share {value} is no share: give a number from 0 to 1")
    return value


def _positive(text: str, flag: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ConfigError(f"{flag}: {text!r} is no positive number, as 64 is")
    return int(text)


def _shape(text: str) -> tuple[int, int]:
    batch, separator, context = text.partition("x")
    if not separator:
        raise ConfigError(f"--decode: {text!r} is not BATCHxCONTEXT, as 64x1024 is")
    return _positive(batch, "--decode"), _positive(context, "--decode")
