"""Two workers on one GPU get no channel, and are told why."""

from __future__ import annotations

import msgspec
import pytest

from phloem.shared.transfer.events import ChannelLost, ChannelOpened
from tests.support.transfer import DECODE, PREFILL, Recorded, transfer_config


def dialed(prefill_device: str, decode_device: str) -> tuple[Recorded, Recorded]:
    decode = Recorded(msgspec.structs.replace(transfer_config(DECODE, accepts=True), device_id=decode_device))
    prefill = Recorded(msgspec.structs.replace(transfer_config(PREFILL), device_id=prefill_device))
    prefill.endpoint.peer_up(DECODE, decode.endpoint.address)
    return prefill, decode


def test_workers_on_one_gpu_are_refused_once_and_for_good() -> None:
    prefill, decode = dialed("GPU-1", "GPU-1")
    try:
        lost = prefill.next(ChannelLost)
        assert (lost.error.code, lost.error.retryable) == ("same_device", False)
        assert "`unified`" in lost.error.message and "same GPU" in lost.error.message
        prefill.assert_silent(0.3)
        decode.assert_silent()
    finally:
        prefill.endpoint.close(0.0)
        decode.endpoint.close(0.0)


@pytest.mark.parametrize(("prefill_device", "decode_device"), [("GPU-1", "GPU-2"), ("", "")])
def test_others_are_joined(prefill_device: str, decode_device: str) -> None:
    prefill, decode = dialed(prefill_device, decode_device)
    try:
        prefill.next(ChannelOpened)
        decode.next(ChannelOpened)
    finally:
        prefill.endpoint.close(0.0)
        decode.endpoint.close(0.0)
