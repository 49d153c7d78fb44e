"""The transfer endpoint that an engine gets from its flags."""

from __future__ import annotations

import pytest
import torch

from phloem.shared.engine.config import EngineConfig, EngineOptions
from phloem.shared.engine.transfer_assembly import open_endpoint, send_rate
from phloem.shared.errors import ConfigError
from phloem.shared.transfer.events import TransferEvent

LAYER_PAGE_BYTES = 4096
CPU = torch.device("cpu")


def config(staging_bytes: int) -> EngineConfig:
    options = EngineOptions(staging_bytes=staging_bytes, staging_slots=2, transfer_peers=1)
    return EngineConfig(
        worker_id="w", epoch=1, role="decode", host="127.0.0.1", cluster_secret=b"s", options=options
    )


def no_event(event: TransferEvent) -> None:
    raise AssertionError(f"nobody is there, and {event} came")


def test_slot_that_holds_no_layer_of_a_page_is_refused_by_its_flag() -> None:
    with pytest.raises(ConfigError, match=r"--staging-bytes 65536 is less than .* \(65537 bytes\)"):
        open_endpoint(config(65_536), CPU, "layout", 65_537, no_event)


def test_endpoint_listens_and_has_sent_nothing_yet() -> None:
    endpoint = open_endpoint(config(65_536), CPU, "layout", LAYER_PAGE_BYTES, no_event)
    try:
        host, _, port = endpoint.address.rpartition(":")
        assert host == "127.0.0.1" and int(port) > 0
        assert send_rate(endpoint) == 0.0
    finally:
        endpoint.close()
