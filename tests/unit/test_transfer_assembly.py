"""The transfer endpoint that an engine gets from its flags."""

from __future__ import annotations

import msgspec
import pytest
import torch

from phloem.shared.engine import transfer_assembly
from phloem.shared.engine.config import EngineConfig, EngineOptions
from phloem.shared.engine.transfer_assembly import open_endpoint
from phloem.shared.errors import ConfigError
from phloem.shared.transfer.config import TransferConfig
from phloem.shared.transfer.events import TransferEvent
from phloem.shared.transfer.stats import SendRates, send_rates

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


@pytest.mark.parametrize(("timeout_s", "opening_s"), [(2.0, 10.0), (30.0, 30.0)])
def test_channel_may_take_ten_seconds_to_open_or_what_other_operations_may(
    monkeypatch: pytest.MonkeyPatch, timeout_s: float, opening_s: float
) -> None:
    made: list[TransferConfig] = []
    monkeypatch.setattr(transfer_assembly, "TransferEndpoint", lambda config, deliver: made.append(config))
    asked = config(65_536)
    options = msgspec.structs.replace(asked.options, transfer_timeout_s=timeout_s)
    asked = msgspec.structs.replace(asked, options=options)
    open_endpoint(asked, CPU, "layout", LAYER_PAGE_BYTES, no_event)
    assert [(c.timeout_s, c.opening_timeout_s) for c in made] == [(timeout_s, opening_s)]


def test_endpoint_listens_and_has_sent_nothing_yet() -> None:
    endpoint = open_endpoint(config(65_536), CPU, "layout", LAYER_PAGE_BYTES, no_event)
    try:
        host, _, port = endpoint.address.rpartition(":")
        assert host == "127.0.0.1" and int(port) > 0
        assert send_rates(endpoint.stats()) == SendRates()
    finally:
        endpoint.close()
