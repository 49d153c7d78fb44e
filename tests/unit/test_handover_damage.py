"""KV that does not add up: the decode side fails closed, and every staging slot comes back."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from phloem.shared.protocol.transfer import Last, Piece
from phloem.shared.transfer.events import LastReceived, PieceReceived, TransferEvent
from tests.support.handover_wire import P, Wire
from tests.support.handover_world import HandoverWorld, Job, assert_handed_over, assert_settled, error_of


def sending(slot_bytes: int = 40, num_tokens: int = 18) -> tuple[HandoverWorld, Job]:
    """5 pages under way, each in a piece of its own, and `Last` behind them."""
    world = HandoverWorld(Wire(slot_bytes=slot_bytes, num_slots=10))
    job = world.job(num_tokens=num_tokens)
    job.begin()
    job.reserve()
    world.wire.pass_all()
    job.make_token()
    world.pump()
    assert len(world.wire.to_decode) == 6
    return world, job


def test_damaged_piece_fails_closed() -> None:
    world, job = sending()
    world.wire.pass_to_decode()
    piece = world.wire.to_decode[0]
    assert isinstance(piece, PieceReceived)
    piece.data[3] ^= 1
    world.run()
    assert error_of(world.failed[job.key]) == ("kv_digest_mismatch", True)
    assert not world.admitted
    assert_settled(world)


def test_damage_is_told_to_a_sender_that_has_not_finished() -> None:
    world = HandoverWorld()
    job = world.job(num_tokens=10)
    job.begin()
    job.reserve()
    world.wire.pass_all()
    job.compute(4)
    world.pump()
    piece = world.wire.to_decode[0]
    assert isinstance(piece, PieceReceived)
    piece.data[0] += 1
    world.run()
    assert error_of(world.failed[job.key]) == ("kv_digest_mismatch", True)
    assert error_of(world.sent[job.key]) == ("handover_cancelled", True)
    assert_settled(world)


def _piece(**changes: int) -> Callable[[TransferEvent], TransferEvent]:
    def change(event: TransferEvent) -> TransferEvent:
        assert isinstance(event, PieceReceived)
        header: Piece = msgspec.structs.replace(event.header, **changes)
        return PieceReceived(event.peer, header, event.data[: header.num_bytes], event.slot)

    return change


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_piece(page_start=0), id="a page again"),
        pytest.param(_piece(page_start=2), id="a page left out"),
        pytest.param(_piece(page_start=5), id="past the end"),
        pytest.param(_piece(page_start=-1), id="before the start"),
        pytest.param(_piece(num_pages=2), id="more pages than bytes"),
        pytest.param(_piece(num_pages=5, num_bytes=160), id="more pages than there are"),
        pytest.param(_piece(num_pages=0, num_bytes=0), id="no page"),
        pytest.param(_piece(layer_start=1, num_bytes=24), id="layers left out"),
        pytest.param(_piece(layer_end=5, num_bytes=40), id="more layers than there are"),
        pytest.param(_piece(layer_start=0, layer_end=0, num_bytes=0), id="no layer"),
        pytest.param(_piece(num_bytes=31), id="short"),
        pytest.param(_piece(num_bytes=33), id="oversized"),
    ],
)
def test_piece_out_of_order_or_of_the_wrong_size_is_refused(
    change: Callable[[TransferEvent], TransferEvent],
) -> None:
    world, job = sending()
    world.wire.pass_to_decode()
    before = dict(world.decode_store.planes)
    world.wire.to_decode[0] = change(world.wire.to_decode[0])
    world.run()
    assert error_of(world.failed[job.key]) == ("kv_bad_piece", True)
    assert world.decode_store.planes == before, "nothing was written"
    assert_settled(world)


def test_swapped_pieces_are_refused() -> None:
    world, job = sending()
    queue = world.wire.to_decode
    queue[1], queue[2] = queue[2], queue[1]
    world.run()
    assert error_of(world.failed[job.key]) == ("kv_bad_piece", True)
    assert_settled(world)


def test_group_of_layers_must_go_on_where_the_last_one_ended() -> None:
    world = HandoverWorld(Wire(slot_bytes=8, num_slots=12))
    job = world.job(num_tokens=4)
    job.begin()
    job.reserve()
    world.wire.pass_all()
    job.make_token()
    world.pump()
    del world.wire.to_decode[1]
    world.run()
    assert error_of(world.failed[job.key]) == ("kv_bad_piece", True)


def test_pieces_must_fit_together_whatever_their_shape() -> None:
    """Half the layers of two pages are as many bytes as a page, and as good a piece, but not here."""
    world, job = sending()
    world.wire.to_decode[0] = _piece(num_pages=2, layer_end=2)(world.wire.to_decode[0])
    world.run()
    assert error_of(world.failed[job.key]) == ("kv_bad_piece", True)
    assert_settled(world)


@pytest.mark.parametrize(
    "last",
    [
        pytest.param(Last("r", 1, 4, [7]), id="fewer pieces"),
        pytest.param(Last("r", 1, 6, [7]), id="more pieces"),
        pytest.param(Last("r", 1, 5, []), id="no token"),
    ],
)
def test_last_that_does_not_match_what_came_is_refused(last: Last) -> None:
    world, job = sending()
    world.wire.to_decode[-1] = LastReceived(P, last)
    world.run()
    assert error_of(world.failed[job.key]) == ("kv_incomplete", True)
    assert not world.admitted
    assert_settled(world)


@pytest.mark.parametrize("num_arrived", [0, 4])
def test_last_before_all_pages_is_refused(num_arrived: int) -> None:
    world, job = sending()
    for _ in range(num_arrived):
        world.wire.pass_to_decode()
    world.wire.to_decode.clear()
    world.wire.to_decode.append(LastReceived(P, Last(*job.key, num_arrived, [7])))
    world.wire.pass_all()
    assert error_of(world.failed[job.key]) == ("kv_incomplete", True)


def test_half_a_page_is_not_complete() -> None:
    world = HandoverWorld(Wire(slot_bytes=16, num_slots=12))
    job = world.job(num_tokens=4)
    job.begin()
    job.reserve()
    world.wire.pass_all()
    job.make_token()
    world.pump()
    del world.wire.to_decode[1]
    world.wire.to_decode[-1] = LastReceived(P, Last(*job.key, 1, [7]))
    world.run()
    assert error_of(world.failed[job.key]) == ("kv_incomplete", True)


def test_piece_of_an_unknown_request_is_dropped_and_its_slot_released() -> None:
    world, job = sending()
    piece = world.wire.to_decode[0]
    assert isinstance(piece, PieceReceived)
    header = msgspec.structs.replace(piece.header, request_id="unknown")
    world.wire.to_decode.appendleft(PieceReceived(P, header, piece.data, world.wire._free.pop()))
    world.run()
    assert_handed_over(world, job)
