"""A peer in another process is killed or stopped: each ends in one ChannelLost within its bound."""

from __future__ import annotations

import functools
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from phloem.shared.protocol.session import PeerRef
from phloem.shared.transfer.config import TransferConfig
from phloem.shared.transfer.events import ChannelLost, ChannelOpened, PieceReceived
from phloem.shared.transfer.pending import MovedNow
from tests.support.transfer import (
    DECODE,
    NUM_SLOTS,
    PREFILL,
    Recorded,
    one_end,
    piece,
    transfer_config,
    wait_until,
)
from tests.support.transfer_child import decode_child, prefill_child

TIMEOUT_S = 1.0
BIG = 16 * 1024 * 1024  # more than the kernel's socket buffers hold


# A killed peer is noticed long before the deadline, a stopped one at the deadline.
deaths = pytest.mark.parametrize(
    ("signal_number", "timeout_s", "bound_s"),
    [(signal.SIGKILL, 20.0, 3.0), (signal.SIGSTOP, TIMEOUT_S, TIMEOUT_S + 1.0)],
)


@contextmanager
def endpoint(config: TransferConfig) -> Iterator[Recorded]:
    with one_end(config) as recorded:
        yield recorded
    assert [t.name for t in threading.enumerate() if t.name.startswith("phloem-transfer")] == []


def prefill_config(timeout_s: float) -> TransferConfig:
    return transfer_config(PREFILL, timeout_s=timeout_s, staging_bytes=BIG)


def decode_config(timeout_s: float) -> TransferConfig:
    return transfer_config(DECODE, accepts=True, timeout_s=timeout_s, staging_bytes=BIG)


def seconds_to_loss(recorded: Recorded, peer: PeerRef) -> float:
    started = time.monotonic()
    lost = recorded.next(ChannelLost, 10.0)
    assert lost.peer == peer and lost.error.retryable
    return time.monotonic() - started


def sent(prefill: Recorded, page: int) -> bool:
    slot = prefill.endpoint.acquire_slot(DECODE)
    if slot is None:
        return False
    slot.tensor.fill_(page + 1)
    prefill.endpoint.send_piece(DECODE, piece("r", page, BIG), slot, MovedNow(page))
    return True


def test_bytes_cross_between_two_processes() -> None:
    with decode_child(decode_config(10.0)) as (child, address), endpoint(prefill_config(10.0)) as prefill:
        prefill.endpoint.peer_up(DECODE, address)
        prefill.next(ChannelOpened)
        for page in range(8):
            wait_until(functools.partial(sent, prefill, page))
            assert child.read() == (page, page + 1, (page + 1) * BIG)


def test_who_is_told_of_more_pieces_than_there_are_slots_gets_every_slot_back() -> None:
    with (
        endpoint(decode_config(10.0)) as decode,
        prefill_child(prefill_config(10.0), DECODE, decode.endpoint.address) as child,
    ):
        decode.next(ChannelOpened, 30.0)
        fills = range(1, 5 * NUM_SLOTS)
        for fill in fills:
            child.pipe.send(fill)
        for fill in fills:
            received = decode.next(PieceReceived)
            assert int(received.data[0]) == fill
            decode.endpoint.release(received)


@deaths
def test_decode_peer_that_dies_while_idle_is_lost_and_dialed_again(
    signal_number: signal.Signals, timeout_s: float, bound_s: float
) -> None:
    with (
        decode_child(decode_config(timeout_s)) as (child, address),
        endpoint(prefill_config(timeout_s)) as prefill,
    ):
        prefill.endpoint.peer_up(DECODE, address)
        prefill.next(ChannelOpened)
        child.process.send_signal(signal_number)
        assert seconds_to_loss(prefill, DECODE) < bound_s
        if signal_number == signal.SIGSTOP:
            child.process.resume()
            prefill.next(ChannelOpened, 10.0)
        else:
            prefill.assert_silent(0.3)


@deaths
def test_prefill_peer_that_dies_is_lost(
    signal_number: signal.Signals, timeout_s: float, bound_s: float
) -> None:
    with (
        endpoint(decode_config(timeout_s)) as decode,
        prefill_child(prefill_config(timeout_s), DECODE, decode.endpoint.address) as child,
    ):
        decode.next(ChannelOpened, 30.0)
        child.pipe.send(5)
        assert int(decode.next(PieceReceived).data.sum()) == 5 * BIG
        child.process.send_signal(signal_number)
        assert seconds_to_loss(decode, PREFILL) < bound_s
        decode.assert_silent(0.2)


@deaths
def test_decode_peer_that_dies_in_mid_piece_is_lost(
    signal_number: signal.Signals, timeout_s: float, bound_s: float
) -> None:
    with (
        decode_child(decode_config(timeout_s)) as (child, address),
        endpoint(prefill_config(timeout_s)) as prefill,
    ):
        prefill.endpoint.peer_up(DECODE, address)
        prefill.next(ChannelOpened)
        child.process.suspend()
        for page in range(NUM_SLOTS):
            assert sent(prefill, page)
        child.process.send_signal(signal_number)
        assert seconds_to_loss(prefill, DECODE) < bound_s
        assert prefill.endpoint.stats()[DECODE].pieces_sent == 0
