"""Builds an engine from its configuration: device, weights, KV pool, transfer endpoint, warm-up."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from phloem.shared.block_hash import BlockHasher
from phloem.shared.engine.config import EngineConfig, EngineOptions
from phloem.shared.engine.engine_loop import Engine
from phloem.shared.engine.engine_parts import EngineParts
from phloem.shared.engine.grammar.parts import GrammarModel, grammar_parts
from phloem.shared.engine.kv_pool import KVPool
from phloem.shared.engine.limits import Limits
from phloem.shared.engine.loading import load_model
from phloem.shared.engine.models.kv_cache import bytes_per_page
from phloem.shared.engine.page_account import PageAccount
from phloem.shared.engine.page_store import page_store
from phloem.shared.engine.radix_tree import RadixTree
from phloem.shared.engine.runners import LoadedModel, find_device, for_device
from phloem.shared.engine.sizing import kv_layout, transfer_peers
from phloem.shared.engine.step_runner import StepRunner
from phloem.shared.engine.transfer_assembly import open_endpoint
from phloem.shared.protocol.engine import EngineReady, EngineUp
from phloem.shared.transfer.endpoint import TransferEndpoint
from phloem.shared.transfer.stats import send_rates

Send = Callable[[EngineUp], None]


def build_engine(
    config: EngineConfig, send: Send, observe: Callable[[StepRunner, torch.device], StepRunner] | None = None
) -> tuple[Engine, EngineReady, TransferEndpoint]:
    """An engine ready to run, what its front is told, and the endpoint to close after it.

    `observe` may put a runner of its own around the device's, as benchmarks do.

    Raises `PhloemError` with a remedy: an unusable device, model or size.
    """
    device = find_device(config.options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # streams, graphs and kernels are the current device's
    options = msgspec.structs.replace(
        for_device(config.options, device),
        transfer_peers=transfer_peers(config.options, config.role),
    )
    config = msgspec.structs.replace(config, options=options)
    torch.set_num_threads(options.num_threads or len(os.sched_getaffinity(0)))
    endpoints: list[TransferEndpoint] = []  # one, once the model and the pool are there
    model, runner = load_model(
        options, device, send, lambda: not any(endpoint.may_use_device for endpoint in endpoints)
    )
    tree = RadixTree(options.page_size)
    account = PageAccount(
        KVPool(model.num_pages),
        tree,
        BlockHasher(config.cluster_secret),
        reuse=not options.disable_radix_cache,
    )
    if observe is not None:
        runner = observe(runner, device)
    layout = kv_layout(Path(options.model_path), options, model.dtype)
    engine, endpoint = _wire(config, model, account, runner, layout, send)
    endpoints.append(endpoint)
    ready = EngineReady(
        context_length=model.context_length,
        page_size=options.page_size,
        num_pages=model.num_pages,
        kv_layout=layout,
        kv_bytes_per_token=bytes_per_page(model.decoder.config, 1, model.dtype),
        transfer_address=endpoint.address,
        device=str(model.device),
        max_running_requests=options.max_running_requests,
    )
    return engine, ready, endpoint


def _wire(
    config: EngineConfig,
    model: LoadedModel,
    account: PageAccount,
    runner: StepRunner,
    layout: str,
    send: Send,
) -> tuple[Engine, TransferEndpoint]:
    options = config.options
    store = page_store(model.kv, model.device)
    # The endpoint and the engine need each other; nothing is delivered before the engine runs.
    engines: list[Engine] = []
    endpoint = open_endpoint(
        config, model.device, layout, store.layer_page_bytes, lambda event: engines[0].deliver(event)
    )
    parts = EngineParts(
        limits=_limits(options),
        account=account,
        runner=runner,
        channels=endpoint,
        store=store,
        send=send,
        dials_peers=config.role != "decode",
        eos_token_ids=model.decoder.config.eos_token_ids,
        context_length=model.context_length,
        handover_timeout_s=options.handover_timeout_s,
        overlap=not options.disable_overlap_schedule,
        grammars=grammar_parts(_grammar_model(options, model), lambda ready: engines[0].deliver(ready)),
        send_rates=lambda: send_rates(endpoint.stats()),
        transfer_status=endpoint.status,
        hang_timeout_s=config.hang_timeout_s,
    )
    engines.append(Engine(parts))
    return engines[0], endpoint


def _limits(options: EngineOptions) -> Limits:
    return Limits(
        max_step_tokens=options.chunked_prefill_size,
        max_slots=options.max_running_requests,
        max_queued=options.max_queued_requests,
        longest_prefix_first=options.schedule_policy == "lpm",
        max_mixed_tokens=options.max_mixed_prefill_tokens,
    )


def _grammar_model(options: EngineOptions, model: LoadedModel) -> GrammarModel:
    return GrammarModel(
        model_dir=Path(options.model_path),
        vocab_size=model.decoder.config.vocab_size,
        eos_token_ids=model.decoder.config.eos_token_ids,
        num_slots=options.max_running_requests,
        on_cuda=model.device.type == "cuda",
    )
