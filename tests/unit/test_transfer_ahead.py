"""Where a device can wait: decode's engine is told of a piece before its bytes have come, and prefill posts
them before they are gathered.

The plane is Gloo's behind a thread that waits in a device's place.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import msgspec
import pytest
import torch
from torch import Tensor

from phloem.shared.errors import PhloemError
from phloem.shared.protocol.transfer import (
    Cancel,
    Credit,
    Last,
    PieceDigest,
    Ready,
    TransferMessage,
    transfer_message,
)
from phloem.shared.transfer import opening
from phloem.shared.transfer.errors import transfer_timeout
from phloem.shared.transfer.events import (
    CancelReceived,
    ChannelLost,
    LastReceived,
    PieceReceived,
    ReadyReceived,
)
from phloem.shared.transfer.pending import Moved, MovedNow, Pending
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
    rogue_decode,
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


class _Departure:
    """Bytes that leave once `after` is done."""

    def __init__(self, plane: DataPlane, data: Tensor, after: Moved | None) -> None:
        self._plane = plane
        self._data = data
        self._after = after

    def done(self) -> bool:
        raise AssertionError("it is waited for")

    def wait(self, timeout_s: float) -> None:
        if self._after is not None:
            self._after.wait(timeout_s)
        self._plane.post_send(self._data).wait(timeout_s)


class _AheadPlane:
    runs_ahead = True

    def __init__(self, plane: DataPlane) -> None:
        self._plane = plane
        self.receives_after: list[Moved | None] = []

    def post_send(self, data: Tensor, after: Moved | None = None, num_bytes: int | None = None) -> Pending:
        return _Departure(self._plane, data[:num_bytes], after)

    def post_receive(self, slot: Tensor, num_bytes: int, after: Moved | None = None) -> Pending:
        self.receives_after.append(after)  # for the device
        return _Arrival(self._plane.post_receive(slot, num_bytes))

    def abort(self) -> None:
        self._plane.abort()


@pytest.fixture
def planes(monkeypatch: pytest.MonkeyPatch) -> list[_AheadPlane]:
    """Those that were opened."""
    opened: list[_AheadPlane] = []

    def open_ahead(spec: PlaneSpec, store: ControlStore) -> DataPlane:
        opened.append(_AheadPlane(open_plane(spec, store)))
        return opened[-1]

    monkeypatch.setattr(opening, "open_plane", open_ahead)
    return opened


@pytest.fixture
def decode(planes: list[_AheadPlane]) -> Iterator[Recorded]:
    del planes
    recorded = Recorded(transfer_config(DECODE, accepts=True, timeout_s=TIMEOUT_S))
    yield recorded
    recorded.endpoint.close(0.0)


class _Gathering(MovedNow):
    """Pages that a device gathers until the test says that it has."""

    def __init__(self, digest: int) -> None:
        super().__init__(digest)
        self.is_gathered = threading.Event()

    def done(self) -> bool:
        return self.is_gathered.is_set()

    def wait(self, timeout_s: float) -> None:
        assert self.is_gathered.wait(timeout_s)

    def digest(self) -> int:
        assert self.is_gathered.is_set(), "the digest is not known yet"
        return super().digest()


@pytest.fixture
def prefill(planes: list[_AheadPlane]) -> Iterator[Recorded]:
    del planes
    recorded = Recorded(transfer_config(PREFILL, timeout_s=TIMEOUT_S))
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


def test_engine_is_told_of_pieces_when_the_receives_of_all_that_came_together_are_posted(
    decode: Recorded, planes: list[_AheadPlane]
) -> None:
    with rogue_prefill(decode) as rogue:
        rogue.frames.post(*[transfer_message.encode(GOOD)] * NUM_SLOTS)
        decode.next(PieceReceived)
        assert len(planes[0].receives_after) == 1 + NUM_SLOTS, "and the channel's first byte"
        for _ in range(NUM_SLOTS - 1):
            decode.next(PieceReceived)


def test_what_follows_a_piece_does_not_wait_for_its_bytes(decode: Recorded) -> None:
    with rogue_prefill(decode) as rogue:
        rogue.write(GOOD)
        rogue.write(Last("r", 1, 1, [7]))
        rogue.write(Cancel("r", 2))
        decode.next(PieceReceived)
        decode.next(LastReceived)
        decode.next(CancelReceived)


def test_credit_leaves_when_the_scatter_is_queued_and_the_next_bytes_wait_for_it(
    decode: Recorded, planes: list[_AheadPlane]
) -> None:
    with rogue_prefill(decode) as rogue:
        scatters = [HeldBack() for _ in range(NUM_SLOTS)]
        for scatter in scatters:
            rogue.write(GOOD)
            decode.endpoint.release(decode.next(PieceReceived), scatter)
            assert next_message(rogue) == Credit(1)
        for _ in scatters:
            rogue.write(GOOD)
            decode.next(PieceReceived)
        posted = planes[0].receives_after[1:]  # without the channel's first byte
        assert posted == [None] * NUM_SLOTS + scatters
        assert not any(scatter.is_done for scatter in scatters)


def test_slot_of_a_dropped_piece_is_filled_again_behind_the_bytes_on_their_way(decode: Recorded) -> None:
    with rogue_prefill(decode) as rogue:
        for _ in range(NUM_SLOTS):
            rogue.write(GOOD)
            decode.endpoint.release(decode.next(PieceReceived))
            assert next_message(rogue) == Credit(1)
        rogue.write(GOOD)
        again = decode.next(PieceReceived)
        for fill in range(NUM_SLOTS + 1):
            send_bytes(rogue, fill)
        assert again.incoming is not None
        again.incoming.wait(5.0)
        assert int(again.data.sum()) == NUM_SLOTS * GOOD.num_bytes


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


def test_header_leaves_while_the_pages_are_gathered_and_the_digest_follows(prefill: Recorded) -> None:
    with rogue_decode(prefill) as rogue:
        assert rogue.plane is not None
        slot = prefill.endpoint.acquire_slot(DECODE)
        assert slot is not None
        gathering = _Gathering(77)
        prefill.endpoint.send_piece(DECODE, GOOD, slot, gathering)
        assert next_message(rogue) == GOOD
        time.sleep(0.2)  # which is not the link's time
        slot.tensor[: GOOD.num_bytes] = 5
        gathering.is_gathered.set()
        data = torch.zeros(GOOD.num_bytes, dtype=torch.uint8)
        rogue.plane.post_receive(data, GOOD.num_bytes).wait(5.0)
        assert int(data.sum()) == 5 * GOOD.num_bytes
        assert next_message(rogue) == PieceDigest(77)
        wait_until(lambda: prefill.endpoint.stats()[DECODE].pieces_sent == 1)
        assert prefill.endpoint.stats()[DECODE].send_s < 0.1


def test_pieces_announced_together_are_credited_before_they_are_sent(prefill: Recorded) -> None:
    """Decode's credit may overtake prefill's own posting."""
    with rogue_decode(prefill) as rogue:
        assert rogue.plane is not None
        slots = [slot for _ in range(2) if (slot := prefill.endpoint.acquire_slot(DECODE)) is not None]
        headers = [GOOD, msgspec.structs.replace(GOOD, page_start=GOOD.page_start + GOOD.num_pages)]
        prefill.endpoint.announce(DECODE, headers, slots)
        assert [next_message(rogue), next_message(rogue)] == headers
        rogue.frames.write(transfer_message.encode(Credit(2)))
        rogue.frames.write(transfer_message.encode(Ready("r", 1, 0)))
        prefill.next(ReadyReceived)  # and so the credits before it
        for fill, (header, slot) in enumerate(zip(headers, slots, strict=True), 1):
            slot.tensor[: GOOD.num_bytes] = fill
            prefill.endpoint.send_piece(DECODE, header, slot, MovedNow(fill))
        data = torch.zeros(GOOD.num_bytes, dtype=torch.uint8)
        for fill in (1, 2):
            rogue.plane.post_receive(data, GOOD.num_bytes).wait(5.0)
            assert int(data.sum()) == fill * GOOD.num_bytes
        assert [next_message(rogue), next_message(rogue)] == [PieceDigest(1), PieceDigest(2)]
        wait_until(lambda: prefill.endpoint.stats()[DECODE].pieces_sent == 2)
        assert prefill.endpoint.is_open(DECODE, "prefill")
