"""A peer in another process is killed or stopped: each ends in one ChannelLost within its bound."""

from __future__ import annotations

import functools
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from phloem.shared.protocol.session import PeerRef
from phloem.shared.transfer.events import ChannelLost, ChannelOpened, PieceReceived
from tests.support.transfer import (
    DECODE,
    PREFILL,
    Recorded,
    piece,
    transfer_config,
    wait_until,
)
from tests.support.transfer_child import decode_child, prefill_child

TIMEOUT_S = 1.0
BIG = 16 * 1024 * 1024  # more than the kernel's socket buffers hold


@pytest.fixture
def prefill() -> Iterator[Recorded]:
    recorded = Recorded(transfer_config(PREFILL, timeout_s=TIMEOUT_S, staging_bytes=BIG))
    yield recorded
    recorded.endpoint.close(0.0)
    assert_no_transfer_threads()


@pytest.fixture
def decode() -> Iterator[Recorded]:
    recorded = Recorded(transfer_config(DECODE, accepts=True, timeout_s=TIMEOUT_S, staging_bytes=BIG))
    yield recorded
    recorded.endpoint.close(0.0)
    assert_no_transfer_threads()


def assert_no_transfer_threads() -> None:
    assert [t.name for t in threading.enumerate() if t.name.startswith("phloem-transfer")] == []


def seconds_to_loss(recorded: Recorded, peer: PeerRef) -> float:
    started = time.monotonic()
    lost = recorded.next(ChannelLost, TIMEOUT_S + 3.0)
    assert lost.peer == peer and lost.error.retryable
    return time.monotonic() - started


def test_bytes_cross_between_two_processes(prefill: Recorded) -> None:
    config = transfer_config(DECODE, accepts=True, staging_bytes=BIG)
    with decode_child(config) as (child, address):
        prefill.endpoint.peer_up(DECODE, address)
        prefill.next(ChannelOpened)
        for page in range(8):
            wait_until(functools.partial(_sent, prefill, page))
            assert child.read() == (page, page + 1, (page + 1) * BIG)


def _sent(prefill: Recorded, page: int) -> bool:
    slot = prefill.endpoint.acquire_slot(DECODE)
    if slot is None:
        return False
    slot.tensor.fill_(page + 1)
    prefill.endpoint.send_piece(DECODE, piece("r", page, BIG), slot)
    return True


@pytest.mark.parametrize(
    ("signal_number", "bound_s"), [(signal.SIGKILL, 1.0), (signal.SIGSTOP, TIMEOUT_S + 1.0)]
)
def test_decode_peer_that_dies_while_idle_is_lost_and_dialed_again(
    prefill: Recorded, signal_number: signal.Signals, bound_s: float
) -> None:
    config = transfer_config(DECODE, accepts=True, timeout_s=TIMEOUT_S)
    with decode_child(config) as (child, address):
        prefill.endpoint.peer_up(DECODE, address)
        prefill.next(ChannelOpened)
        child.process.send_signal(signal_number)
        assert seconds_to_loss(prefill, DECODE) < bound_s
        if signal_number == signal.SIGSTOP:
            child.process.resume()
            prefill.next(ChannelOpened, 10.0)
        else:
            prefill.assert_silent(0.3)


@pytest.mark.parametrize(
    ("signal_number", "bound_s"), [(signal.SIGKILL, 1.0), (signal.SIGSTOP, TIMEOUT_S + 1.0)]
)
def test_prefill_peer_that_dies_is_lost(
    decode: Recorded, signal_number: signal.Signals, bound_s: float
) -> None:
    config = transfer_config(PREFILL, timeout_s=TIMEOUT_S, staging_bytes=BIG)
    with prefill_child(config, DECODE, decode.endpoint.address) as child:
        decode.next(ChannelOpened, 30.0)
        child.pipe.send(5)
        received = decode.next(PieceReceived)
        assert int(received.data.sum()) == 5 * BIG
        child.process.send_signal(signal_number)
        assert seconds_to_loss(decode, PREFILL) < bound_s
        decode.assert_silent(0.2)


def test_decode_peer_that_stops_in_mid_piece_is_lost(prefill: Recorded) -> None:
    config = transfer_config(DECODE, accepts=True, timeout_s=TIMEOUT_S, staging_bytes=BIG)
    with decode_child(config) as (child, address):
        prefill.endpoint.peer_up(DECODE, address)
        prefill.next(ChannelOpened)
        child.process.suspend()
        for page in range(3):
            assert _sent(prefill, page)
        assert seconds_to_loss(prefill, DECODE) < TIMEOUT_S + 1.0
        assert prefill.endpoint.stats()[DECODE].pieces_sent == 0
