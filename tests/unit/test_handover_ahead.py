"""Pieces that the receiver is told of before their bytes and digests have come: scattered behind them."""

from __future__ import annotations

import msgspec
import pytest
import torch

from phloem.shared.transfer.events import PieceReceived
from phloem.shared.transfer.pending import SentDigest
from tests.support.handover_wire import Wire
from tests.support.handover_world import HandoverWorld, Job, assert_handed_over, assert_settled, error_of


class _Bytes:
    """See `Incoming`; the test says when they are there."""

    stream: torch.cuda.Stream

    def __init__(self, digest_to_come: int) -> None:
        self.have_come = False
        self.digest_to_come = digest_to_come

    def done(self) -> bool:
        return self.have_come

    def wait(self, timeout_s: float) -> None:
        raise AssertionError("an engine's turn waits for nothing")

    def hold_back(self, stream: torch.cuda.Stream) -> None:
        raise AssertionError("there is no device here")


def announced(num_tokens: int = 12) -> tuple[HandoverWorld, Job, list[PieceReceived]]:
    """All pieces and `Last` were taken; no bytes, no digest and no scatter is there yet."""
    world = HandoverWorld(Wire(slot_bytes=64, num_slots=4))
    world.decode_store.holds_back = True
    job = world.job(num_tokens=num_tokens)
    job.begin()
    job.reserve()
    world.wire.pass_all()
    job.make_token()
    world.pump()
    pieces = [item for item in world.wire.to_decode if isinstance(item, PieceReceived)]
    early = [_early(piece) for piece in pieces]
    for index, piece in enumerate(early):
        world.wire.to_decode[index] = piece
    world.run()
    assert len(early) > 1 and not world.admitted
    return world, job, early


def _early(piece: PieceReceived) -> PieceReceived:
    header = msgspec.structs.replace(piece.header, digest=0)
    incoming = _Bytes(piece.header.digest)
    return PieceReceived(piece.peer, header, piece.data, piece.slot, incoming, SentDigest())


def tell(piece: PieceReceived, change: int = 0) -> None:
    assert isinstance(piece.incoming, _Bytes) and piece.sent_digest is not None
    piece.incoming.have_come = True
    piece.sent_digest.tell(piece.incoming.digest_to_come ^ change)


def finish(world: HandoverWorld) -> None:
    world.decode_store.finish()
    world.poll()
    world.run()


def test_request_is_admitted_when_all_is_scattered_and_every_digest_was_told() -> None:
    world, job, pieces = announced()
    for piece in pieces[:-1]:
        tell(piece)
    finish(world)
    assert not world.admitted and not world.failed
    tell(pieces[-1])
    finish(world)
    assert_handed_over(world, job)


def test_another_digest_than_that_of_what_came_is_refused() -> None:
    world, job, pieces = announced()
    tell(pieces[0])
    tell(pieces[1], change=1)
    finish(world)
    assert error_of(world.failed[job.key]) == ("kv_digest_mismatch", True)
    assert world.decode_store.num_withdrawn == len(pieces) - 2
    assert not world.admitted


@pytest.mark.parametrize("missing", ["bytes", "digest"])
def test_lost_channel_fails_what_had_not_come_although_its_last_had(missing: str) -> None:
    world, job, pieces = announced()
    for piece in pieces[:-1]:
        tell(piece)
    if missing == "bytes":
        tell(pieces[-1])
        assert isinstance(pieces[-1].incoming, _Bytes)
        pieces[-1].incoming.have_come = False
    world.wire.lose()
    assert error_of(world.failed[job.key]) == ("channel_lost", True)
    assert world.decode_store.num_withdrawn == len(pieces)
    finish(world)
    assert not world.admitted


def test_lost_channel_leaves_what_has_come() -> None:
    world, job, pieces = announced()
    for piece in pieces:
        tell(piece)
    world.wire.lose()
    assert not world.failed
    finish(world)
    assert world.admitted[job.key] == [7] and job.kv_arrived
    assert not world.receiver.active
    assert_settled(world)


def test_device_is_looked_at_all_the_time_while_the_last_pieces_land() -> None:
    world, job, pieces = announced(num_tokens=20)
    looks = [world.receiver.next_look_s]
    assert len(pieces) > 2
    for piece in pieces[:-1]:
        tell(piece)
    looks.append(world.receiver.next_look_s)
    for moved in world.decode_store.held[:-2]:
        moved.is_done = True
    world.poll()
    looks.append(world.receiver.next_look_s)
    tell(pieces[-1])
    looks.append(world.receiver.next_look_s)
    assert looks[0] == looks[1] == looks[2] > 10 * looks[3]
    world.pass_time(0.01)
    assert world.receiver.next_look_s == looks[0], "the link is slow, or the peer hangs"
    finish(world)
    assert_handed_over(world, job)
    assert world.receiver.next_look_s == looks[0]
