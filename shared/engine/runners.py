"""Which device an engine runs on, and the runner that drives it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import msgspec
import torch

from phloem.shared.engine.config import EngineOptions
from phloem.shared.engine.models.decoder import Decoder
from phloem.shared.engine.models.kv_cache import KVCache
from phloem.shared.engine.step_runner import StepRunner, SyncStepRunner
from phloem.shared.engine.warmup import warm_up
from phloem.shared.errors import ConfigError
from phloem.shared.protocol.engine import EngineUp, Progress

_WARMUP_TOKENS = 64
_FLASHINFER_HEAD_DIMS = (64, 128, 256)


class LoadedModel(NamedTuple):
    """Weights and KV tensors on their device; the KV tensors hold `num_pages` pages and a scratch page."""

    decoder: Decoder
    kv: KVCache
    device: torch.device
    dtype: torch.dtype
    context_length: int
    num_pages: int


def find_device(name: str) -> torch.device:
    """The device of `--device`. Raises `ConfigError` when it is not there."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: torch sees no CUDA device; use --device cpu", param="device")
    device = torch.device("cuda:0" if name == "cuda" else name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0",
            param="device",
        )
    return device


def for_device(options: EngineOptions, device: torch.device) -> EngineOptions:
    """The options with what depends on the device filled in."""
    cuda = device.type == "cuda"
    running = options.max_running_requests or (256 if cuda else 64)
    return msgspec.structs.replace(
        options,
        chunked_prefill_size=options.chunked_prefill_size or (8192 if cuda else 2048),
        max_running_requests=running,
        cuda_graph_max_bs=min(options.cuda_graph_max_bs or running, running),
    )


def build_runner(options: EngineOptions, model: LoadedModel, send: Callable[[EngineUp], None]) -> StepRunner:
    """A warm runner; on CUDA with its decode graphs captured. `options` are `for_device`'s."""
    backend = attention_backend(options, model)
    runner = (
        _sync_runner(options, model) if backend == "torch" else _cuda_runner(options, model, backend, send)
    )
    send(Progress("warmup", 0, 1))
    pool_tokens = model.num_pages * options.page_size
    tokens = min(options.chunked_prefill_size, model.context_length - 1, pool_tokens, _WARMUP_TOKENS)
    warm_up(runner, tokens, options.page_size)
    send(Progress("warmup", 1, 1))
    return runner


def attention_backend(options: EngineOptions, model: LoadedModel) -> str:
    """ "flashinfer", "triton" or "torch". Raises `ConfigError` for one that can't run here."""
    name = options.attention_backend
    if model.device.type != "cuda":
        if name not in ("auto", "torch"):
            raise ConfigError(
                f"--attention-backend {name} needs a CUDA device; on a CPU use torch",
                param="attention_backend",
            )
        return "torch"
    can_flashinfer = (
        importlib.util.find_spec("flashinfer") is not None
        and model.decoder.config.head_dim in _FLASHINFER_HEAD_DIMS
        and model.dtype in (torch.bfloat16, torch.float16)
    )
    if name == "flashinfer" and not can_flashinfer:
        raise ConfigError(
            "--attention-backend flashinfer needs flashinfer-python, bfloat16 or float16, and a head_dim of "
            f"{_FLASHINFER_HEAD_DIMS}; this model has {model.dtype} and {model.decoder.config.head_dim}: use "
            "triton",
            param="attention_backend",
        )
    if name == "auto":
        return "flashinfer" if can_flashinfer else "triton"
    return name


def _max_pages(options: EngineOptions, model: LoadedModel) -> int:
    return -(-model.context_length // options.page_size)


def _sync_runner(options: EngineOptions, model: LoadedModel) -> StepRunner:
    return SyncStepRunner(
        model.decoder,
        model.kv,
        model.device,
        num_slots=options.max_running_requests,
        max_pages=_max_pages(options, model),
    )


def _cuda_runner(
    options: EngineOptions, model: LoadedModel, backend: str, send: Callable[[EngineUp], None]
) -> StepRunner:
    # Triton and FlashInfer are imported only where there is a CUDA device.
    from phloem.shared.engine.cuda_attention import AttentionSizes, device_attention
    from phloem.shared.engine.cuda_runner import CudaStepRunner, decode_buckets
    from phloem.shared.engine.step_inputs import RunnerSizes

    max_pages = _max_pages(options, model)
    attention = device_attention(
        model.decoder.config,
        model.dtype,
        model.device,
        "flashinfer" if backend == "flashinfer" else "triton",
        AttentionSizes(options.page_size, options.max_running_requests, max_pages),
    )
    runner = CudaStepRunner(
        model.decoder,
        model.kv,
        model.device,
        attention,
        RunnerSizes(
            num_slots=options.max_running_requests,
            max_pages=max_pages,
            max_step_tokens=options.chunked_prefill_size,
            page_size=options.page_size,
            scratch_page=model.num_pages,
        ),
    )
    if not options.disable_cuda_graph:
        runner.capture(
            decode_buckets(options.cuda_graph_max_bs),
            lambda done, total: send(Progress("cuda_graphs", done, total)),
        )
    return runner
