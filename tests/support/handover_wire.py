"""Both ends of one KV channel in memory: what one end sends waits until the test lets it arrive."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import msgspec
import torch
from torch import Tensor

from phloem.shared.errors import ErrorInfo
from phloem.shared.protocol.session import PeerRef
from phloem.shared.protocol.transfer import Admitted, Cancel, Last, Piece, Ready
from phloem.shared.transfer.errors import channel_lost
from phloem.shared.transfer.events import (
    AdmittedReceived,
    CancelReceived,
    ChannelLost,
    ChannelOpened,
    LastReceived,
    PieceReceived,
    ReadyReceived,
    Side,
    SlotAvailable,
    TransferEvent,
)
from phloem.shared.transfer.pending import Incoming, Moved
from phloem.shared.transfer.staging import StagingSlot

P = PeerRef("prefill", 1)
D = PeerRef("decode", 1)

Deliver: TypeAlias = Callable[[TransferEvent], None]


class HeldBack:
    """See `Moved`; done when the test says so."""

    def __init__(self, digest: int = 0) -> None:
        self.is_done = False
        self._digest = digest

    def done(self) -> bool:
        return self.is_done

    def wait(self, timeout_s: float) -> None:
        assert self.is_done, "an engine's turn waits for nothing"

    def digest(self) -> int:
        assert self.is_done, "the digest is not known yet"
        return self._digest

    def hold_back(self, stream: torch.cuda.Stream) -> None:
        raise AssertionError("there is no device here")


class FakePageStore:
    """Pages as bytes, by (page, layer); the digest is a CRC."""

    def __init__(self, num_layers: int = 4, layer_page_bytes: int = 8) -> None:
        self.num_layers = num_layers
        self.layer_page_bytes = layer_page_bytes
        self.planes: dict[tuple[int, int], bytes] = {}
        self.num_fences = 0
        self.beside: list[int] = []  # of what it moved: bytes that cross meanwhile
        self.num_withdrawn = 0
        self.holds_back = False  # a device that takes its time
        self.held: list[HeldBack] = []  # what it has not finished

    def gather(
        self, page_ids: Sequence[int], layer_start: int, layer_end: int, out: Tensor, beside: int = 0
    ) -> Moved:
        self.beside.append(beside)
        wanted = [(page, layer) for layer in range(layer_start, layer_end) for page in page_ids]
        data = b"".join(self.planes[plane] for plane in wanted)
        out[: len(data)].copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return self._moved(zlib.crc32(data))

    def scatter(
        self,
        page_ids: Sequence[int],
        layer_start: int,
        layer_end: int,
        data: Tensor,
        after: Incoming | None = None,
        beside: int = 0,
    ) -> Moved:
        self.beside.append(beside)
        raw = bytes(data.tolist())
        size = self.layer_page_bytes
        wanted = [(page, layer) for layer in range(layer_start, layer_end) for page in page_ids]
        assert len(raw) == size * len(wanted)
        for index, plane in enumerate(wanted):
            self.planes[plane] = raw[index * size : (index + 1) * size]
        return self._moved(zlib.crc32(raw))

    def fence(self) -> None:
        self.num_fences += 1

    def withdraw(self, scatters: Iterable[Moved]) -> None:
        self.num_withdrawn += len(list(scatters))

    def finish(self) -> None:
        """The device is done with all that it was given."""
        for moved in self.held:
            moved.is_done = True
        self.held.clear()

    def _moved(self, digest: int) -> Moved:
        moved = HeldBack(digest)
        self.held.append(moved)
        if not self.holds_back:
            self.finish()
        return moved

    def fill(self, page_ids: Sequence[int], name: str) -> None:
        """Makes up KV of pages: a function of `name`, the place among `page_ids`, and the layer."""
        for place, page in enumerate(page_ids):
            for layer in range(self.num_layers):
                word = zlib.crc32(f"{name}/{place}/{layer}".encode()).to_bytes(4, "little")
                self.planes[page, layer] = (word * self.layer_page_bytes)[: self.layer_page_bytes]

    def content(self, page_ids: Sequence[int]) -> list[bytes | None]:
        return [self.planes.get((page, layer)) for page in page_ids for layer in range(self.num_layers)]


class Wire:
    """The channel; `prefill` and `decode` are what the two engines hold of it.

    It has `num_slots` staging slots of `slot_bytes`; a slot is the sender's again when the receiver has
    released its piece and that news has arrived.
    """

    def __init__(self, *, slot_bytes: int = 64, num_slots: int = 4, is_open: bool = True) -> None:
        self.slot_bytes = slot_bytes
        self.num_slots = num_slots
        self.is_open = is_open
        self.prefill = WireEnd(self, "prefill", D)
        self.decode = WireEnd(self, "decode", P)
        self.to_prefill: deque[TransferEvent | StagingSlot] = deque()  # a slot: the credit for it
        self.to_decode: deque[TransferEvent] = deque()
        self.clock: Callable[[], float] = lambda: 0.0  # the prefill side's
        self.deliver_to_prefill: Deliver = _nobody
        self.deliver_to_decode: Deliver = _nobody
        self.unreleased: list[PieceReceived] = []  # delivered to the decode side
        self._epoch = 0
        self._free: list[StagingSlot] = []
        self._acquired: deque[StagingSlot] = deque()
        self._announced: deque[Piece] = deque()
        self._starved = False  # an acquire failed since the last `SlotAvailable`
        self._reset()

    # -- what the test does ----------------------------------------------------------------------------

    def pass_to_prefill(self) -> None:
        """The oldest message on its way to the prefill side arrives."""
        item = self.to_prefill.popleft()
        if isinstance(item, StagingSlot):
            self._free.append(item)
            if self._starved:
                self._starved = False
                self.deliver_to_prefill(SlotAvailable(D))
        else:
            self.deliver_to_prefill(item)

    def pass_to_decode(self) -> None:
        event = self.to_decode.popleft()
        if isinstance(event, PieceReceived):
            self.unreleased.append(event)
        self.deliver_to_decode(event)

    def pass_all(self) -> None:
        """Until nothing is on its way."""
        while self.to_decode or self.to_prefill:
            if self.to_decode:
                self.pass_to_decode()
            if self.to_prefill:
                self.pass_to_prefill()

    def lose(self) -> None:
        """The channel breaks: what was on its way is gone, both ends hear of it."""
        assert self.is_open
        self.is_open = False
        self._reset()
        error = ErrorInfo("channel_lost", "the wire is cut", True, 503)
        self.deliver_to_prefill(ChannelLost(D, "prefill", error))
        self.deliver_to_decode(ChannelLost(P, "decode", error))

    def open(self) -> None:
        assert not self.is_open
        self.is_open = True
        self.deliver_to_prefill(ChannelOpened(D, "prefill"))
        self.deliver_to_decode(ChannelOpened(P, "decode"))

    @property
    def num_free_slots(self) -> int:
        return len(self._free)

    # -- what the ends do ------------------------------------------------------------------------------

    def acquire(self) -> StagingSlot | None:
        if not self._free:
            self._starved = True
            return None
        self._acquired.append(self._free.pop())
        return self._acquired[-1]

    def announce(self, pieces: Sequence[Piece], slots: Sequence[StagingSlot]) -> None:
        assert not self._announced, "what was announced is sent before anything else is"
        assert len(pieces) == len(slots) and list(self._acquired) == list(slots), "each has a slot"
        self._announced.extend(pieces)

    def send_piece(self, piece: Piece, slot: StagingSlot, gathered: Moved) -> None:
        assert piece == self._announced.popleft()
        assert slot is self._acquired.popleft(), "a slot is acquired for exactly one piece"
        assert piece.num_bytes <= slot.tensor.numel()
        piece = msgspec.structs.replace(piece, digest=gathered.digest())
        self.to_decode.append(PieceReceived(P, piece, slot.tensor[: piece.num_bytes].clone(), slot))

    def release(self, piece: PieceReceived) -> None:
        if piece.slot.channel_name != str(self._epoch):
            return  # of a channel that was lost
        matching = [event for event in self.unreleased if event.slot is piece.slot]
        assert matching, "a slot is released once, and only after its piece arrived"
        self.unreleased.remove(matching[0])
        self.to_prefill.append(piece.slot)

    def _reset(self) -> None:
        self._epoch += 1
        self.to_prefill.clear()
        self.to_decode.clear()
        self.unreleased.clear()
        self._starved = False
        self._acquired.clear()
        self._announced.clear()
        self._free = [
            StagingSlot(index, str(self._epoch), torch.zeros(self.slot_bytes, dtype=torch.uint8))
            for index in range(self.num_slots)
        ]


class WireEnd:
    """One engine's `Peers`: it knows the one peer at the other end."""

    def __init__(self, wire: Wire, side: Side, peer: PeerRef) -> None:
        self._wire = wire
        self._side = side
        self._peer = peer
        self.peers_up: list[tuple[PeerRef, str]] = []
        self.peers_down: list[PeerRef] = []

    def is_open(self, peer: PeerRef, side: Side) -> bool:
        return (peer, side) == (self._peer, self._side) and self._wire.is_open

    def acquire_slot(self, peer: PeerRef) -> StagingSlot | None:
        self._check(peer, "prefill")
        return self._wire.acquire()

    def announce(self, peer: PeerRef, pieces: Sequence[Piece], slots: Sequence[StagingSlot]) -> None:
        self._check(peer, "prefill")
        self._wire.announce(pieces, slots)

    def send_piece(self, peer: PeerRef, piece: Piece, slot: StagingSlot, gathered: Moved) -> None:
        self._check(peer, "prefill")
        self._wire.send_piece(piece, slot, gathered)

    def send_last(self, peer: PeerRef, message: Last) -> None:
        self._check(peer, "prefill")
        self._wire.to_decode.append(LastReceived(P, message))

    def send_ready(self, peer: PeerRef, message: Ready) -> None:
        self._check(peer, "decode")
        self._wire.to_prefill.append(ReadyReceived(D, message))

    def send_admitted(self, peer: PeerRef, message: Admitted) -> None:
        self._check(peer, "decode")
        self._wire.to_prefill.append(AdmittedReceived(D, message, self._wire.clock()))

    def send_cancel(self, peer: PeerRef, message: Cancel, side: Side) -> None:
        self._check(peer, side)
        if side == "prefill":
            self._wire.to_decode.append(CancelReceived(P, "decode", message))
        else:
            self._wire.to_prefill.append(CancelReceived(D, "prefill", message))

    def release(self, piece: PieceReceived, after: Moved | None = None) -> None:
        assert self._side == "decode"
        self._wire.release(piece)

    def peer_up(self, peer: PeerRef, address: str) -> None:
        self.peers_up.append((peer, address))

    def peer_down(self, peer: PeerRef) -> None:
        self.peers_down.append(peer)
        if peer == self._peer and self._wire.is_open:
            self._wire.lose()

    def _check(self, peer: PeerRef, side: Side) -> None:
        assert side == self._side
        if not self.is_open(peer, side):
            raise channel_lost(f"no channel with {peer}")


def _nobody(event: TransferEvent) -> None:
    raise AssertionError(f"nobody takes {event}")
