"""Builds an engine from its configuration: device, weights, KV pool, transfer endpoint, warm-up."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from phloem.shared.block_hash import BlockHasher
from phloem.shared.engine.config import EngineConfig
from phloem.shared.engine.engine_loop import Engine
from phloem.shared.engine.engine_parts import EngineParts
from phloem.shared.engine.fault_injection import damaging
from phloem.shared.engine.grammar.parts import GrammarModel, grammar_parts
from phloem.shared.engine.kv_pool import KVPool
from phloem.shared.engine.limits import Limits
from phloem.shared.engine.loading import load_model, out_of_memory_as
from phloem.shared.engine.memory import gb, staging_not_allocated
from phloem.shared.engine.models.kv_cache import bytes_per_page
from phloem.shared.engine.page_account import PageAccount
from phloem.shared.engine.page_store import page_store
from phloem.shared.engine.radix_tree import RadixTree
from phloem.shared.engine.rehearsal import memory_gauge
from phloem.shared.engine.runners import LoadedModel, find_device, for_device
from phloem.shared.engine.sizing import kv_layout, staging_reserve, transfer_peers
from phloem.shared.engine.step_runner import StepRunner
from phloem.shared.errors import ConfigError
from phloem.shared.protocol.engine import EngineReady, EngineUp
from phloem.shared.protocol.session import PeerRef
from phloem.shared.transfer.config import TransferConfig
from phloem.shared.transfer.endpoint import TransferEndpoint

log = logging.getLogger(__name__)

Send = Callable[[EngineUp], None]


def build_engine(
    config: EngineConfig, send: Send, observe: Callable[[StepRunner, torch.device], StepRunner] | None = None
) -> tuple[Engine, EngineReady, TransferEndpoint]:
    """An engine ready to run, what its front is told, and the endpoint to close after it.

    `observe` may put a runner of its own around the device's, as benchmarks do.

    Raises `PhloemError` with a remedy: an unusable device, model or size.
    """
    device = find_device(config.options.device)
    options = msgspec.structs.replace(
        for_device(config.options, device), transfer_peers=transfer_peers(config.options, config.role)
    )
    config = msgspec.structs.replace(config, options=options)
    torch.set_num_threads(options.num_threads or len(os.sched_getaffinity(0)))
    model, runner = load_model(options, device, send)
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
    if options.staging_bytes < store.layer_page_bytes:
        raise ConfigError(
            f"--staging-bytes {options.staging_bytes} is less than one layer's page "
            f"({store.layer_page_bytes} bytes)",
            param="staging_bytes",
        )
    # The endpoint and the engine need each other; nothing is delivered before the engine runs.
    engines: list[Engine] = []
    memory, reserve = memory_gauge(model.device).read(), staging_reserve(options)
    log.info("%s of staging memory for KV transfer with %d peers", gb(reserve), options.transfer_peers)
    with out_of_memory_as(lambda: staging_not_allocated(reserve, memory)):
        endpoint = TransferEndpoint(
            _transfer_config(config, model.device, layout, store.layer_page_bytes),
            damaging(config.faults, lambda event: engines[0].deliver(event)),
        )
    grammars = grammar_parts(
        GrammarModel(
            Path(options.model_path),
            model.decoder.config.vocab_size,
            model.decoder.config.eos_token_ids,
            options.max_running_requests,
            model.device.type == "cuda",
        ),
        lambda ready: engines[0].deliver(ready),
    )
    engine = Engine(
        EngineParts(
            limits=Limits(
                options.chunked_prefill_size,
                options.max_running_requests,
                options.max_queued_requests,
                options.schedule_policy == "lpm",
                options.max_mixed_prefill_tokens,
            ),
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
            grammars=grammars,
            transfer_bytes_per_s=lambda: _send_rate(endpoint),
            transfer_status=endpoint.status,
            hang_timeout_s=config.hang_timeout_s,
        )
    )
    engines.append(engine)
    return engine, endpoint


def _transfer_config(
    config: EngineConfig, device: torch.device, layout: str, layer_page_bytes: int
) -> TransferConfig:
    options = config.options
    return TransferConfig(
        me=PeerRef(config.worker_id, config.epoch),
        host=config.host,
        cluster_secret=config.cluster_secret,
        kv_layout=layout,
        device=str(device),
        device_id=_device_id(device),
        staging_bytes=options.staging_bytes,
        staging_slots=options.staging_slots,
        max_peers=options.transfer_peers,
        least_slot_bytes=layer_page_bytes,
        max_ctas=options.transfer_max_ctas,
        timeout_s=options.transfer_timeout_s,
        accepts=config.role != "prefill",
    )


def _device_id(device: torch.device) -> str:
    """Of a GPU, the same in every process and container; "" for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def _send_rate(endpoint: TransferEndpoint) -> float:
    """Bytes per second of all that was sent, over the time in which something was under way."""
    stats = endpoint.stats().values()
    seconds = sum(peer.send_s for peer in stats)
    return sum(peer.bytes_sent for peer in stats) / seconds if seconds > 0 else 0.0
