"""The decode side where a device can wait for bytes: its engine is told of a piece before they have come.

The plane is Gloo's behind a thread that waits in a device's place.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from phloem.shared.errors import PhloemError
from phloem.shared.protocol.transfer import (
    Cancel,
    Credit,
    Last,
    PieceDigest,
    TransferMessage,
    transfer_message,
)
from phloem.shared.transfer import channel
from phloem.shared.transfer.errors import transfer_timeout
from phloem.shared.transfer.events import CancelReceived, ChannelLost, LastReceived, PieceReceived
from phloem.shared.transfer.pending import Moved, Pending
from phloem.shared.transfer.planes import DataPlane, PlaneSpec, open_plane
from phloem.shared.transfer.rendezvous import ControlStore
from tests.support.handover_wire import HeldBack
from tests.support.transfer import (
    DECODE,
    NUM_SLOTS,
    PREFILL,
    Recorded,
    RoguePeer,
    piece,
    rogue_prefill,
    transfer_config,
    wait_until,
)

TIMEOUT_S = 1.0
GOOD = piece("r")


class _Arrival:
    """See `Incoming`; it is over, well or not, when the bytes are there or the plane was aborted."""

    stream = None

    def __init__(self, receive: Pending) -> None:
        self._over = threading.Event()
        threading.Thread(target=self._await, args=(receive,)).start()

    def done(self) -> bool:
        return self._over.is_set()

    def wait(self, timeout_s: float) -> None:
        if not self._over.wait(timeout_s):
            raise transfer_timeout("no bytes")

    def hold_back(self, stream: torch.cuda.Stream) -> None:
        raise AssertionError("there is no device here")

    def _await(self, receive: Pending) -> None:
        with contextlib.suppress(PhloemError):  # as on a device: an aborted receive just ends
            receive.wait(30.0)
        self._over.set()


class _AheadPlane:
    def __init__(self, plane: DataPlane) -> None:
        self._plane = plane

    def post_send(self, data: Tensor, after: Moved | None = None) -> Pending:
        return self._plane.post_send(data, after)

    def post_receive(self, slot: Tensor, num_bytes: int) -> Pending:
        return _Arrival(self._plane.post_receive(slot, num_bytes))

    def abort(self) -> None:
        self._plane.abort()


def _open_ahead(spec: PlaneSpec, store: ControlStore) -> DataPlane:
    return _AheadPlane(open_plane(spec, store))


@pytest.fixture
def decode(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorded]:
    monkeypatch.setattr(channel, "open_plane", _open_ahead)
    recorded = Recorded(transfer_config(DECODE, accepts=True, timeout_s=TIMEOUT_S))
    yield recorded
    recorded.endpoint.close(0.0)


def send_bytes(rogue: RoguePeer, fill: int) -> None:
    assert rogue.plane is not None
    rogue.plane.post_send(torch.full((GOOD.num_bytes,), fill, dtype=torch.uint8)).wait(5.0)


def next_message(rogue: RoguePeer) -> TransferMessage:
    """But keep-alives."""
    while not (payload := rogue.frames.read(1 << 20)):
        pass
    return transfer_message.decode(payload)


def test_engine_is_told_by_the_header_then_come_bytes_and_digest(decode: Recorded) -> None:
    with rogue_prefill(decode) as rogue:
        rogue.write(GOOD)
        received = decode.next(PieceReceived)
        assert received.header == GOOD and received.incoming is not None
        assert received.digest is None and not received.has_come
        send_bytes(rogue, 3)
        received.incoming.wait(5.0)
        assert int(received.data.sum()) == 3 * GOOD.num_bytes
        assert not received.has_come, "its digest is missing"
        rogue.write(PieceDigest(77))
        wait_until(lambda: received.digest == 77)
        assert received.has_come


def test_what_follows_a_piece_does_not_wait_for_its_bytes(decode: Recorded) -> None:
    with rogue_prefill(decode) as rogue:
        rogue.write(GOOD)
        rogue.write(Last("r", 1, 1, [7]))
        rogue.write(Cancel("r", 2))
        decode.next(PieceReceived)
        decode.next(LastReceived)
        decode.next(CancelReceived)


def test_credit_leaves_when_the_bytes_have_come_and_were_scattered(decode: Recorded) -> None:
    with rogue_prefill(decode) as rogue:
        rogue.write(GOOD)
        rogue.write(PieceDigest(1))
        received, scattered = decode.next(PieceReceived), _Scattered()
        decode.endpoint.release(received, scattered)
        send_bytes(rogue, 1)
        assert received.incoming is not None
        received.incoming.wait(5.0)
        assert scattered.was_awaited.wait(5.0)
        rogue.frames.set_timeout(0.1)
        with pytest.raises(PhloemError):
            next_message(rogue)
        rogue.frames.set_timeout(5.0)
        scattered.finish()
        assert next_message(rogue) == Credit(1)


def test_slot_of_a_dropped_piece_is_not_filled_again_before_its_bytes_have_come(decode: Recorded) -> None:
    with rogue_prefill(decode) as rogue:
        for _ in range(NUM_SLOTS):
            rogue.write(GOOD)
            rogue.write(PieceDigest(1))
        for _ in range(NUM_SLOTS):
            decode.endpoint.release(decode.next(PieceReceived))
        rogue.frames.set_timeout(0.1)
        with pytest.raises(PhloemError):
            next_message(rogue)
        rogue.frames.set_timeout(5.0)
        for _ in range(NUM_SLOTS):
            send_bytes(rogue, 1)
            assert next_message(rogue) == Credit(1)


@pytest.mark.parametrize("missing", ["bytes", "digest"])
def test_what_never_comes_ends_the_channel_within_the_deadline(decode: Recorded, missing: str) -> None:
    with rogue_prefill(decode) as rogue:
        started = time.monotonic()
        rogue.write(GOOD)
        if missing == "bytes":
            rogue.write(PieceDigest(1))
        else:
            send_bytes(rogue, 1)
        received = decode.next(PieceReceived)
        while time.monotonic() - started < TIMEOUT_S / 2:  # it lives
            rogue.frames.write(b"")
            time.sleep(0.05)
        rogue.frames.write(b"")
        lost = decode.next(ChannelLost)
        assert (lost.peer, lost.error.code) == (PREFILL, "transfer_timeout")
        assert time.monotonic() - started < TIMEOUT_S + 1.0
        assert not received.has_come or missing == "bytes"


class _Scattered(HeldBack):
    def __init__(self) -> None:
        super().__init__()
        self.was_awaited = threading.Event()
        self._finished = threading.Event()

    def finish(self) -> None:
        self._finished.set()

    def wait(self, timeout_s: float) -> None:
        self.was_awaited.set()
        assert self._finished.wait(timeout_s)
