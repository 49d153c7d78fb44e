"""Builds an engine's transfer endpoint from its configuration."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from phloem.shared.engine.config import EngineConfig
from phloem.shared.engine.fault_injection import damaging
from phloem.shared.engine.loading import out_of_memory_as
from phloem.shared.engine.memory import gb, staging_not_allocated
from phloem.shared.engine.rehearsal import memory_gauge
from phloem.shared.engine.sizing import staging_reserve
from phloem.shared.errors import ConfigError
from phloem.shared.protocol.session import PeerRef
from phloem.shared.transfer.config import TransferConfig, opening_bound_s
from phloem.shared.transfer.endpoint import TransferEndpoint
from phloem.shared.transfer.events import TransferEvent
from phloem.shared.transfer.link_terms import link_terms

log = logging.getLogger(__name__)


def open_endpoint(
    config: EngineConfig,
    device: torch.device,
    layout: str,
    layer_page_bytes: int,
    deliver: Callable[[TransferEvent], None],
) -> TransferEndpoint:
    """Allocates the staging memory and listens; `deliver` is called on the endpoint's threads.

    Raises `ConfigError` for slots that hold no layer of a page (`layer_page_bytes`), or memory that is not
    there.
    """
    options = config.options
    if options.staging_bytes < layer_page_bytes:
        raise ConfigError(
            f"--staging-bytes {options.staging_bytes} is less than one layer's page "
            f"({layer_page_bytes} bytes)",
            param="staging_bytes",
        )
    memory, reserve = memory_gauge(device).read(), staging_reserve(options)
    log.info("%s of staging memory for KV transfer with %d peers", gb(reserve), options.transfer_peers)
    with out_of_memory_as(lambda: staging_not_allocated(reserve, memory)):
        return TransferEndpoint(
            _transfer_config(config, device, layout, layer_page_bytes), damaging(config.faults, deliver)
        )


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
        link=link_terms(device.type, options.transfer_max_ctas),
        staging_bytes=options.staging_bytes,
        staging_slots=options.staging_slots,
        max_peers=options.transfer_peers,
        least_slot_bytes=layer_page_bytes,
        max_ctas=options.transfer_max_ctas,
        timeout_s=options.transfer_timeout_s,
        opening_timeout_s=opening_bound_s(options.transfer_timeout_s),
        accepts=config.role != "prefill",
    )


def _device_id(device: torch.device) -> str:
    """Of a GPU, the same in every process and container; "" for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
