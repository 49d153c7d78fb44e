"""The flags of `phloem bench offline`, and the engine and the work that they ask for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Group, Parameter
from msgspec import Meta

from phloem.shared.config.loader import load_config
from phloem.shared.engine.config import AttentionBackend, DtypeName, EngineOptions, LoadFormat
from phloem.shared.engine.offline.work import OfflineWork
from phloem.shared.errors import ConfigError

_ENGINE = Group("Engine", sort_key=1)
_WORK = Group("Work", sort_key=2)
_MOST_TOKENS = 10_000_000  # as long as a context may be
_SECTION = "bench"  # no file has such a table: flags alone count


@Parameter(name="*", group=_ENGINE)
@dataclass(frozen=True, kw_only=True)
class EngineFlags:
    """Which model, and how it runs: fields of `EngineOptions`, which says what each may be."""

    model_path: Annotated[str, Parameter(help="model directory, GGUF, hub id or short name")]
    load_format: Annotated[LoadFormat, Parameter(help="dummy: random weights, config.json is enough")] = (
        "auto"
    )
    device: Annotated[str, Parameter(help="auto, cpu, cuda or cuda:N")] = "auto"
    dtype: Annotated[DtypeName, Parameter(help="of weights and activations")] = "auto"
    attention_backend: Annotated[AttentionBackend, Parameter(help="attention kernels")] = "auto"
    mem_fraction_static: Annotated[
        float,
        Parameter(
            help="share of a GPU's memory for weights and KV pages; on a CPU, of free RAM for KV pages; "
            "0: 0.9 of a GPU, 0.125 on a CPU"
        ),
    ] = 0.0
    context_length: Annotated[int, Parameter(help="longest prompt + output; 0: the model's own")] = 0
    max_running_requests: Annotated[int, Parameter(help="slots; 0: 256 on CUDA, else 64")] = 0
    max_total_tokens: Annotated[
        int, Parameter(help="size of the KV pool in tokens; 0: from --mem-fraction-static")
    ] = 0
    page_size: Annotated[int, Parameter(help="tokens per KV page; must divide 64")] = 16
    chunked_prefill_size: Annotated[
        int, Parameter(help="most tokens of one engine step; 0: 8192 on CUDA, else 2048")
    ] = 0
    disable_overlap_schedule: Annotated[
        bool, Parameter(help="wait for each step's results before planning the next")
    ] = False
    cuda_graph_max_bs: Annotated[
        int, Parameter(help="largest batch with a CUDA graph; 0: --max-running-requests")
    ] = 0
    disable_cuda_graph: Annotated[bool, Parameter(help="run decode steps eagerly")] = False
    disable_decode_kernels: Annotated[
        bool, Parameter(help="capture decode steps of the library's kernels instead of Phloem's own")
    ] = False
    disable_cooperative_decode: Annotated[
        bool, Parameter(help="no decode kernels whose blocks wait for each other")
    ] = False


@Parameter(name="*", group=_WORK)
@dataclass(frozen=True, kw_only=True)
class WorkFlags:
    """What is measured."""

    prefill: Annotated[str, Parameter(help="prompt lengths, with commas")] = "512,1024,8192"
    decode: Annotated[str, Parameter(help="BATCHxCONTEXT, with commas")] = "1x1024,16x1024,64x1024"
    steps: Annotated[int, Parameter(help="decode steps per shape")] = 64
    temperature: Annotated[float, Parameter(help="of the decode steps; 0 is greedy")] = 0.0
    top_p: Annotated[float, Parameter(help="of the decode steps; 1: off")] = 1.0
    top_k: Annotated[int, Parameter(help="of the decode steps; 0: off")] = 0
    min_p: Annotated[float, Parameter(help="of the decode steps; 0: off")] = 0.0
    sampled: Annotated[
        bool,
        Parameter(help="measure the largest shape of batch 64 again at temperature 1 and top-p 0.95"),
    ] = False
    grammar_share: Annotated[
        float, Parameter(help="measure decode steps again with a grammar on this share of the rows, as 0.5")
    ] = 0.0


def engine_options(flags: EngineFlags) -> EngineOptions:
    """With the model's directory, fetched when it isn't here.

    Raises `ConfigError` for a flag out of its range, before anything is fetched, and `PhloemError`.
    """
    options = load_config(EngineOptions, section=_SECTION, overrides=asdict(flags))
    load_format = _load_format(options)
    model_dir = _resolved(options.model_path, load_format)
    return msgspec.structs.replace(options, model_path=str(model_dir), load_format=load_format)


def offline_work(flags: WorkFlags) -> OfflineWork:
    """Raises `ConfigError` for what is no number or shape, or out of its range."""
    lists = {
        "prefill": tuple(_positive(item, "--prefill") for item in flags.prefill.split(",") if item),
        "decode": tuple(_shape(item) for item in flags.decode.split(",") if item),
    }
    return load_config(OfflineWork, section=_SECTION, overrides=asdict(flags) | lists)


def _load_format(options: EngineOptions) -> LoadFormat:
    """A shape has no weights to load: random ones are meant."""
    from phloem.shared.model_store.shapes import is_shape

    is_auto = options.load_format == "auto"
    return "dummy" if is_auto and is_shape(Path(options.model_path)) else options.load_format


def _resolved(model_path: str, load_format: LoadFormat) -> Path:
    from phloem.shared.model_store.resolve import default_cache_dir, resolve_model

    need_weights = load_format != "dummy"
    return resolve_model(model_path, cache_dir=default_cache_dir(), need_weights=need_weights)


def _positive(text: str, flag: str) -> int:
    try:
        number: int = msgspec.convert(text.strip(), Annotated[int, Meta(ge=1, le=_MOST_TOKENS)], strict=False)
    except msgspec.ValidationError:
        raise ConfigError(f"{flag}: {text!r} is no positive number, as 64 is") from None
    return number


def _shape(text: str) -> tuple[int, int]:
    batch, separator, context = text.partition("x")
    if not separator:
        raise ConfigError(f"--decode: {text!r} is not BATCHxCONTEXT, as 64x1024 is")
    return _positive(batch, "--decode"), _positive(context, "--decode")
