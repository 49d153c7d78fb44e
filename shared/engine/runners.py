"""Which device an engine runs on, and the runner that drives it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal, NamedTuple

import msgspec
import torch

from phloem.shared.engine import gpu_facts
from phloem.shared.engine.backend import Backend, ModelFacts, Refusal, choose_backend, decode_fallback
from phloem.shared.engine.config import GPU_MEM_FRACTION, EngineOptions
from phloem.shared.engine.models.decoder import Decoder
from phloem.shared.engine.models.kv_cache import KVCache
from phloem.shared.engine.step_runner import StepRunner, SyncStepRunner
from phloem.shared.engine.warmup import warm_up, warm_up_filters
from phloem.shared.errors import ConfigError
from phloem.shared.protocol.engine import EngineUp, Progress

log = logging.getLogger(__name__)

_CPU_WARMUP_TOKENS = 64


class LoadedModel(NamedTuple):
    """Weights and KV tensors on their device; the KV tensors hold `num_pages` pages and a scratch page."""

    decoder: Decoder
    kv: KVCache
    device: torch.device
    dtype: torch.dtype
    context_length: int
    num_pages: int


def find_device(name: str) -> torch.device:
    """The device of `--device`; `auto` passes over a GPU that the engine can't use, and says so.

    Raises `ConfigError` when the one that was asked for is not there, or can't be used.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: torch sees no CUDA device; use --device cpu", param="device")
    device = torch.device("cuda:0" if name in ("auto", "cuda") else name)
    if (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0",
            param="device",
        )
    refused = gpu_facts.device_refusal(device)
    if refused is None:
        return device
    if name != "auto":
        raise ConfigError(refused.message, param=refused.param)
    log.warning("running on the CPU: %s", refused.message)
    return torch.device("cpu")


def for_device(options: EngineOptions, device: torch.device) -> EngineOptions:
    """The options with what depends on the device filled in."""
    cuda = device.type == "cuda"
    running = options.max_running_requests or (256 if cuda else 64)
    return msgspec.structs.replace(
        options,
        chunked_prefill_size=options.chunked_prefill_size or (8192 if cuda else 2048),
        # By benchmarks/simulate_mixed_steps.py: less costs the median, more the 99th percentile of ITL.
        max_mixed_prefill_tokens=options.max_mixed_prefill_tokens or (1024 if cuda else 0),
        max_running_requests=running,
        # On a CPU 0 stays: it tells a share that was asked for from one that leaves room for others.
        mem_fraction_static=options.mem_fraction_static or (GPU_MEM_FRACTION if cuda else 0.0),
        cuda_graph_max_bs=min(options.cuda_graph_max_bs or running, running),
    )


def pick_backend(
    options: EngineOptions, device: torch.device, model: ModelFacts, send: Callable[[EngineUp], None]
) -> Backend:
    """What the engine runs on; logs what is done instead of what was wanted, compiles what must be compiled.

    Raises `ConfigError` for a backend that can't run here.
    """
    facts = gpu_facts.find_gpu_facts(device, model) if device.type == "cuda" else None
    chosen = choose_backend(options.attention_backend, facts, model)
    if isinstance(chosen, Refusal):
        raise ConfigError(chosen.message, param=chosen.param)
    _log_notes(chosen.notes)
    if facts is None:
        return chosen.backend
    if (note := decode_fallback(options, facts, model)) is not None:
        _log_notes((note,))
    if not chosen.compiles:
        return chosen.backend
    failure = gpu_facts.compile_kernels(
        device, model, lambda done, total: send(Progress("flashinfer_kernels", done, total))
    )
    if failure is None:
        return chosen.backend
    without = facts._replace(flashinfer_problem=f"its kernels could not be compiled ({failure})")
    instead = choose_backend(options.attention_backend, without, model)
    if isinstance(instead, Refusal):
        raise ConfigError(instead.message, param=instead.param)
    _log_notes(instead.notes)
    return instead.backend


def _log_notes(notes: tuple[str, ...]) -> None:
    for note in notes:
        log.warning("%s", note)


def build_runner(
    options: EngineOptions,
    model: LoadedModel,
    backend: Backend,
    send: Callable[[EngineUp], None],
    is_alone: Callable[[], bool],
) -> StepRunner:
    """The runner of a model; on CUDA with its decode graphs captured. `options` are `for_device`'s;
    `is_alone` tells, at any time, whether nothing but steps runs on the device (`cooperative_steps.py`)."""
    if backend == "torch":
        return _sync_runner(options, model)
    return _cuda_runner(options, model, backend, send, is_alone)


def warm_up_runner(options: EngineOptions, model: LoadedModel, runner: StepRunner) -> None:
    """First-time costs now; on CUDA also the largest step, so that memory runs out now or never."""
    pool_tokens = model.num_pages * options.page_size
    tokens = min(options.chunked_prefill_size, model.context_length - 1, pool_tokens)
    if model.device.type == "cuda":
        rows = min(options.max_running_requests, model.num_pages)
        warm_up(runner, tokens, options.page_size)
        warm_up_filters(runner, rows, model.decoder.config.vocab_size)
    else:
        warm_up(runner, min(tokens, _CPU_WARMUP_TOKENS), options.page_size)


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
    options: EngineOptions,
    model: LoadedModel,
    backend: Literal["flashinfer", "triton"],
    send: Callable[[EngineUp], None],
    is_alone: Callable[[], bool],
) -> StepRunner:
    # Triton and FlashInfer are imported only where there is a CUDA device.
    from phloem.shared.engine.cuda_attention import AttentionSizes, device_attention
    from phloem.shared.engine.cuda_runner import CudaStepRunner, decode_buckets
    from phloem.shared.engine.decode_parts import decode_parts
    from phloem.shared.engine.step_inputs import RunnerSizes

    max_pages = _max_pages(options, model)
    decode = decode_parts(options, model, max_pages, is_alone)
    attention = device_attention(
        model.decoder.config,
        model.dtype,
        model.device,
        backend,
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
        decode,
    )
    if not options.disable_cuda_graph:
        runner.capture(
            decode_buckets(options.cuda_graph_max_bs),
            lambda done, total: send(Progress("cuda_graphs", done, total)),
        )
    return runner
