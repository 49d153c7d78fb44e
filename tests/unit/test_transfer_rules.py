"""A peer that knows the secret but breaks the rules loses its channel; nobody else is hurt."""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec
import pytest
import torch

from phloem.shared.protocol.transfer import (
    Cancel,
    Credit,
    Last,
    Opened,
    PieceDigest,
    Ready,
    TransferMessage,
)
from phloem.shared.transfer.events import ChannelLost, ChannelOpened, PieceReceived, ReadyReceived
from phloem.shared.transfer.pending import MovedNow
from tests.support.transfer import (
    DECODE,
    NUM_SLOTS,
    PREFILL,
    SLOT_BYTES,
    Recorded,
    piece,
    rogue_decode,
    rogue_prefill,
    transfer_config,
)

TIMEOUT_S = 1.0


@pytest.fixture
def decode() -> Iterator[Recorded]:
    recorded = Recorded(transfer_config(DECODE, accepts=True, timeout_s=TIMEOUT_S))
    yield recorded
    recorded.endpoint.close(0.0)


@pytest.fixture
def prefill() -> Iterator[Recorded]:
    recorded = Recorded(transfer_config(PREFILL, timeout_s=TIMEOUT_S))
    yield recorded
    recorded.endpoint.close(0.0)


GOOD = piece("r")


@pytest.mark.parametrize(
    "message",
    [
        msgspec.structs.replace(GOOD, num_bytes=SLOT_BYTES + 1),
        msgspec.structs.replace(GOOD, num_bytes=0),
        msgspec.structs.replace(GOOD, num_bytes=-1),
        msgspec.structs.replace(GOOD, num_pages=0),
        msgspec.structs.replace(GOOD, page_start=-1),
        msgspec.structs.replace(GOOD, layer_start=1, layer_end=1),
        msgspec.structs.replace(GOOD, layer_start=-1),
        Last("r", 1, -1, []),
        Ready("r", 1, 0),
        Credit(1),
        Opened(1, 1),
    ],
)
def test_decode_side_ends_the_channel(decode: Recorded, message: TransferMessage) -> None:
    with rogue_prefill(decode) as rogue:
        rogue.write(message)
        lost = decode.next(ChannelLost)
        assert (lost.peer, lost.error.code) == (PREFILL, "transfer_protocol")


@pytest.mark.parametrize(
    "message", [Credit(1), Credit(0), Credit(-1), Ready("r", 1, -1), GOOD, Last("r", 1, 0, [])]
)
def test_prefill_side_ends_the_channel(prefill: Recorded, message: TransferMessage) -> None:
    with rogue_decode(prefill) as rogue:
        rogue.write(message)
        lost = prefill.next(ChannelLost)
        assert (lost.peer, lost.error.code) == (DECODE, "transfer_protocol")


def test_frame_that_is_no_message_ends_the_channel(decode: Recorded) -> None:
    with rogue_prefill(decode) as rogue:
        rogue.frames.write(b"\xc1garbage")
        assert decode.next(ChannelLost).error.code == "bad_message"


def test_frame_over_the_limit_ends_the_channel_unread(decode: Recorded) -> None:
    with rogue_prefill(decode) as rogue:
        rogue.frames.write(bytes(1024 * 1024 + 1))
        assert decode.next(ChannelLost).error.code == "transfer_protocol"


def test_piece_without_a_credit_ends_the_channel(decode: Recorded) -> None:
    with rogue_prefill(decode) as rogue:
        assert rogue.plane is not None
        data = torch.full((GOOD.num_bytes,), 3, dtype=torch.uint8)
        sends = []
        for _ in range(NUM_SLOTS):
            rogue.write(GOOD)
            sends.append(rogue.plane.post_send(data))
            rogue.write(PieceDigest(1))
        received = [decode.next(PieceReceived) for _ in range(NUM_SLOTS)]
        rogue.write(GOOD)
        assert decode.next(ChannelLost).error.code == "transfer_protocol"
        assert all(int(r.data.sum()) == 3 * GOOD.num_bytes for r in received)


def test_header_without_its_bytes_ends_the_channel_within_the_deadline(decode: Recorded) -> None:
    with rogue_prefill(decode) as rogue:
        started = time.monotonic()
        rogue.write(GOOD)
        while time.monotonic() - started < TIMEOUT_S / 2:  # it lives: only its bytes are missing
            rogue.frames.write(b"")
            time.sleep(0.05)
        rogue.frames.write(b"")
        lost = decode.next(ChannelLost)
        assert time.monotonic() - started < TIMEOUT_S + 1.0
        assert lost.error.code == "transfer_timeout"


def test_fewer_and_more_bytes_than_announced_do_not_kill_the_process(decode: Recorded) -> None:
    with rogue_prefill(decode) as rogue:
        assert rogue.plane is not None
        for num_bytes in (10, SLOT_BYTES):
            rogue.write(GOOD)
            rogue.plane.post_send(torch.full((num_bytes,), 7, dtype=torch.uint8)).wait(5.0)
            rogue.write(PieceDigest(num_bytes))
            received = decode.next(PieceReceived)  # the digest is the engine's to check
            assert received.header.digest == num_bytes
            assert received.data.numel() == GOOD.num_bytes
        decode.assert_silent()


def test_silent_peer_is_lost_and_one_that_only_says_it_lives_is_not(decode: Recorded) -> None:
    with rogue_prefill(decode) as rogue:
        until = time.monotonic() + 2 * TIMEOUT_S
        while time.monotonic() < until:
            rogue.frames.write(b"")
            time.sleep(TIMEOUT_S / 6)
        decode.assert_silent()
        started = time.monotonic()
        assert decode.next(ChannelLost).error.code == "transfer_timeout"
        assert time.monotonic() - started < TIMEOUT_S + 1.0


def test_peer_that_takes_no_bytes_is_lost_within_the_deadline(prefill: Recorded) -> None:
    with rogue_decode(prefill) as rogue:
        slot = prefill.endpoint.acquire_slot(DECODE)
        assert slot is not None
        started = time.monotonic()
        prefill.endpoint.send_piece(DECODE, piece("r", 0, SLOT_BYTES), slot, MovedNow(0))
        while time.monotonic() - started < TIMEOUT_S / 2:
            rogue.frames.write(b"")
            time.sleep(0.05)
        rogue.frames.write(b"")
        assert prefill.next(ChannelLost).error.code == "transfer_timeout"
        assert time.monotonic() - started < TIMEOUT_S + 1.0


def test_each_side_says_that_it_lives(prefill: Recorded) -> None:
    with rogue_decode(prefill) as rogue:
        assert rogue.frames.read(16) == b""


def test_piece_of_a_cancelled_request_is_still_delivered(decode: Recorded) -> None:
    with rogue_prefill(decode) as rogue:
        assert rogue.plane is not None
        decode.endpoint.send_cancel(PREFILL, Cancel("r", 1), "decode")
        rogue.write(GOOD)
        rogue.plane.post_send(torch.ones(GOOD.num_bytes, dtype=torch.uint8)).wait(5.0)
        rogue.write(PieceDigest(GOOD.digest))
        assert decode.next(PieceReceived).header == GOOD


def test_piece_without_its_digest_is_never_delivered(decode: Recorded) -> None:
    with rogue_prefill(decode) as rogue:
        assert rogue.plane is not None
        started = time.monotonic()
        rogue.write(GOOD)
        rogue.plane.post_send(torch.ones(GOOD.num_bytes, dtype=torch.uint8)).wait(5.0)
        while time.monotonic() - started < TIMEOUT_S / 2:  # it lives: only the digest is missing
            rogue.frames.write(b"")
            time.sleep(0.05)
        rogue.frames.write(b"")
        assert decode.next(ChannelLost).error.code == "transfer_timeout"
        assert time.monotonic() - started < TIMEOUT_S + 1.0


def test_digest_of_a_piece_that_never_was_ends_the_channel(decode: Recorded) -> None:
    with rogue_prefill(decode) as rogue:
        rogue.write(PieceDigest(1))
        assert decode.next(ChannelLost).error.code == "transfer_protocol"


def test_one_prefill_peers_fault_leaves_another_alone(decode: Recorded) -> None:
    honest = msgspec.structs.replace(PREFILL, worker_id="prefill-b")
    other = Recorded(transfer_config(honest, timeout_s=TIMEOUT_S))
    with rogue_prefill(decode) as rogue:
        other.endpoint.peer_up(DECODE, decode.endpoint.address)
        assert decode.next(ChannelOpened).peer == honest
        rogue.frames.write(b"\xc1")
        assert decode.next(ChannelLost).peer == PREFILL
        decode.endpoint.send_ready(honest, Ready("r", 1, 0))
        assert other.next_of(ReadyReceived).message.request_id == "r"
    other.endpoint.close(0.0)
