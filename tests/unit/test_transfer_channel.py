"""Two endpoints, joined: what goes in comes out, in order, within the credits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from phloem.shared.errors import PhloemError
from phloem.shared.protocol.session import PeerRef
from phloem.shared.protocol.transfer import Cancel, Last, Ready
from phloem.shared.transfer.events import (
    CancelReceived,
    ChannelLost,
    ChannelOpened,
    LastReceived,
    PieceReceived,
    ReadyReceived,
    SlotAvailable,
)
from phloem.shared.transfer.pending import MovedNow
from tests.support.transfer import (
    DECODE,
    NUM_SLOTS,
    PREFILL,
    SLOT_BYTES,
    Pair,
    Recorded,
    joined,
    piece,
    transfer_config,
    wait_until,
)


@pytest.fixture
def pair() -> Iterator[Pair]:
    with joined() as pair:
        yield pair


def test_bytes_arrive_equal_and_in_order(pair: Pair) -> None:
    generator = torch.Generator().manual_seed(1)
    sent = [torch.randint(0, 256, (n,), dtype=torch.uint8, generator=generator) for n in (1, 999, SLOT_BYTES)]
    for page, data in enumerate(sent):
        slot = pair.prefill.endpoint.acquire_slot(DECODE)
        assert slot is not None
        slot.tensor[: data.numel()] = data
        pair.prefill.endpoint.send_piece(DECODE, piece("r", page, data.numel()), slot, MovedNow(page))
    for page, data in enumerate(sent):
        received = pair.decode.next(PieceReceived)
        assert (received.peer, received.header) == (PREFILL, piece("r", page, data.numel()))
        assert torch.equal(received.data, data)


def test_never_more_pieces_outstanding_than_credits(pair: Pair) -> None:
    for page in range(NUM_SLOTS):
        assert pair.send(piece("r", page), fill=page)
    assert not pair.send(piece("r", NUM_SLOTS), fill=9)
    received = [pair.decode.next(PieceReceived) for _ in range(NUM_SLOTS)]
    # All slots have left by now, and still nothing may be sent: the decode side has not emptied them.
    wait_until(lambda: pair.prefill.endpoint.stats()[DECODE].pieces_sent == NUM_SLOTS)
    pair.prefill.assert_silent()
    assert pair.prefill.endpoint.acquire_slot(DECODE) is None

    pair.decode.endpoint.release(received[0])
    assert pair.prefill.next(SlotAvailable) == SlotAvailable(DECODE)
    assert pair.send(piece("r", NUM_SLOTS), fill=9)
    assert int(pair.decode.next(PieceReceived).data[0]) == 9
    assert [int(r.data[0]) for r in received[1:]] == [1, 2], "slots not released are not overwritten"


def test_slot_available_comes_once_for_a_failed_acquire(pair: Pair) -> None:
    for page in range(NUM_SLOTS):
        pair.send(piece("r", page), fill=page)
    assert pair.prefill.endpoint.acquire_slot(DECODE) is None
    for _ in range(NUM_SLOTS):
        pair.decode.endpoint.release(pair.decode.next(PieceReceived))
    pair.prefill.next(SlotAvailable)
    pair.decode.endpoint.send_ready(PREFILL, Ready("fence", 1, 0))
    assert pair.prefill.next(ReadyReceived).message.request_id == "fence"


def test_slot_given_back_unsent_can_be_acquired_again(pair: Pair) -> None:
    slots = [pair.prefill.endpoint.acquire_slot(DECODE) for _ in range(NUM_SLOTS)]
    assert pair.prefill.endpoint.acquire_slot(DECODE) is None
    assert slots[0] is not None
    pair.prefill.endpoint.give_back(DECODE, slots[0])
    pair.prefill.next(SlotAvailable)
    assert pair.prefill.endpoint.acquire_slot(DECODE) is slots[0]


def test_last_comes_after_all_pieces_before_it(pair: Pair) -> None:
    for page in range(NUM_SLOTS):
        pair.send(piece("r", page, SLOT_BYTES), fill=page)
    pair.prefill.endpoint.send_last(DECODE, Last("r", 1, NUM_SLOTS, [42]))
    for _ in range(NUM_SLOTS):
        pair.decode.next(PieceReceived)
    assert pair.decode.next(LastReceived) == LastReceived(PREFILL, Last("r", 1, NUM_SLOTS, [42]))


def test_ready_and_cancels_go_both_ways(pair: Pair) -> None:
    pair.decode.endpoint.send_ready(PREFILL, Ready("r", 2, 5))
    assert pair.prefill.next(ReadyReceived) == ReadyReceived(DECODE, Ready("r", 2, 5))
    cancel = Cancel("r", 2, "aborted", "the client went away")
    pair.decode.endpoint.send_cancel(PREFILL, cancel, "decode")
    assert pair.prefill.next(CancelReceived) == CancelReceived(DECODE, "prefill", cancel)
    pair.prefill.endpoint.send_cancel(DECODE, cancel, "prefill")
    assert pair.decode.next(CancelReceived) == CancelReceived(PREFILL, "decode", cancel)


def test_a_channel_takes_the_smaller_slot_of_both_sides() -> None:
    decode = Recorded(transfer_config(DECODE, accepts=True, staging_bytes=5000))
    prefill = Recorded(transfer_config(PREFILL, staging_bytes=9000))
    prefill.endpoint.peer_up(DECODE, decode.endpoint.address)
    prefill.next(ChannelOpened)
    slot = prefill.endpoint.acquire_slot(DECODE)
    assert slot is not None and slot.tensor.numel() == 5000
    prefill.endpoint.close(0.0)
    decode.endpoint.close()


def test_close_lets_what_was_sent_arrive(pair: Pair) -> None:
    for page in range(NUM_SLOTS):
        pair.send(piece("r", page, SLOT_BYTES), fill=page + 1)
    pair.prefill.endpoint.send_last(DECODE, Last("r", 1, NUM_SLOTS, [42]))
    # Nobody releases a piece, so that the grace runs out: the bytes have arrived all the same.
    pair.prefill.endpoint.close(0.2)
    assert [int(pair.decode.next(PieceReceived).data[-1]) for _ in range(NUM_SLOTS)] == [1, 2, 3]
    pair.decode.next(LastReceived)
    assert pair.decode.next(ChannelLost).error.retryable


def test_calls_without_an_open_channel_raise_channel_lost(pair: Pair) -> None:
    slot = pair.prefill.endpoint.acquire_slot(DECODE)
    assert slot is not None
    pair.prefill.endpoint.peer_down(DECODE)
    stranger = PeerRef("decode-b", 1)
    calls: list[Callable[[], object]] = [
        lambda: pair.prefill.endpoint.acquire_slot(DECODE),
        lambda: pair.prefill.endpoint.send_piece(DECODE, piece("r"), slot, MovedNow(0)),
        lambda: pair.prefill.endpoint.send_last(DECODE, Last("r", 1, 0, [])),
        lambda: pair.prefill.endpoint.send_cancel(stranger, Cancel("r", 1), "prefill"),
        lambda: pair.prefill.endpoint.send_cancel(DECODE, Cancel("r", 1), "decode"),
        lambda: pair.decode.endpoint.send_ready(PeerRef(PREFILL.worker_id, 2), Ready("r", 1, 0)),
    ]
    for call in calls:
        with pytest.raises(PhloemError) as caught:
            call()
        assert (caught.value.code, caught.value.retryable) == ("channel_lost", True)


def test_slot_and_piece_of_an_older_channel_do_not_touch_the_new_one(pair: Pair) -> None:
    old_slot = pair.prefill.endpoint.acquire_slot(DECODE)
    assert old_slot is not None
    assert pair.send(piece("r"), fill=1)
    old_piece = pair.decode.next(PieceReceived)
    pair.decode.endpoint.peer_down(PREFILL)
    pair.prefill.next_of(ChannelLost)
    pair.prefill.next(ChannelOpened)
    pair.decode.next(ChannelLost)
    pair.decode.next(ChannelOpened)

    with pytest.raises(PhloemError):
        pair.prefill.endpoint.send_piece(DECODE, piece("r"), old_slot, MovedNow(0))
    with pytest.raises(PhloemError):
        pair.prefill.endpoint.announce(DECODE, [piece("r")], [old_slot])
    pair.prefill.endpoint.give_back(DECODE, old_slot)
    pair.decode.endpoint.release(old_piece)
    for page in range(NUM_SLOTS):
        assert pair.send(piece("new", page), fill=7)
    assert not pair.send(piece("new", NUM_SLOTS), fill=7), "no credit came from the old piece"
    assert [pair.decode.next(PieceReceived).header.page_start for _ in range(NUM_SLOTS)] == [0, 1, 2]
    assert int(old_piece.data[0]) == 1


def test_two_unified_workers_hold_a_channel_each_way() -> None:
    a, b = PeerRef("unified-a", 1), PeerRef("unified-b", 1)
    left, right = (Recorded(transfer_config(me, accepts=True)) for me in (a, b))
    left.endpoint.peer_up(b, right.endpoint.address)
    left.next(ChannelOpened)
    assert left.endpoint.is_open(b, "prefill") and not left.endpoint.is_open(b, "decode")
    right.endpoint.peer_up(a, left.endpoint.address)
    right.next(ChannelOpened)
    wait_until(lambda: left.endpoint.is_open(b, "decode"))
    left.endpoint.peer_down(b)
    assert {left.next_of(ChannelLost).side for _ in range(2)} == {"prefill", "decode"}
    right.endpoint.close(0.0)
    left.endpoint.close(0.0)


def test_stats_count_bytes_and_busy_time(pair: Pair) -> None:
    pair.send(piece("r", 0, 1000), fill=1)
    pair.send(piece("r", 1, 500), fill=1)
    pair.decode.next(PieceReceived)
    pair.decode.next(PieceReceived)
    wait_until(lambda: pair.prefill.endpoint.stats()[DECODE].pieces_sent == 2)
    sent = pair.prefill.endpoint.stats()[DECODE]
    received = pair.decode.endpoint.stats()[PREFILL]
    assert (sent.bytes_sent, sent.channels_opened, sent.bytes_received) == (1500, 1, 0)
    assert (received.bytes_received, received.pieces_received) == (1500, 2)
    assert 0.0 < sent.send_s < 5.0 and 0.0 < received.receive_s < 5.0
