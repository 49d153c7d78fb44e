"""A prefill side that leaves: bytes that it has promised come soon, or the channel is lost long before its
deadline, though nothing else tells that they never will (NCCL waits for a dead peer)."""

from __future__ import annotations

import time

import pytest
import torch

from phloem.shared.protocol.transfer import PieceDigest
from phloem.shared.transfer.events import ChannelLost, PieceReceived
from tests.support.transfer import DECODE, Recorded, piece, rogue_prefill, transfer_config


@pytest.fixture
def decode() -> Recorded:
    return Recorded(transfer_config(DECODE, accepts=True, timeout_s=30.0))


def test_bytes_that_never_come_end_the_channel_soon_after_the_peer_left(decode: Recorded) -> None:
    try:
        with rogue_prefill(decode) as rogue:
            rogue.write(piece("r", num_bytes=4096))
            left = time.monotonic()
            rogue.frames.shutdown()  # its process group stays: the receive just waits
            assert decode.next(ChannelLost).error.code == "channel_lost"
            assert 0.5 < time.monotonic() - left < 3.0
    finally:
        decode.endpoint.close(0.0)


def test_bytes_that_come_after_the_peer_left_are_taken(decode: Recorded) -> None:
    try:
        with rogue_prefill(decode) as rogue:
            assert rogue.plane is not None
            rogue.write(piece("r", num_bytes=4096))
            rogue.write(PieceDigest(7))
            rogue.frames.shutdown()
            rogue.plane.post_send(torch.full((4096,), 7, dtype=torch.uint8)).wait(5.0)
            assert int(decode.next(PieceReceived).data.sum()) == 7 * 4096
            decode.next(ChannelLost)
    finally:
        decode.endpoint.close(0.0)
