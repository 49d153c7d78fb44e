"""The prefill side of a channel: credits in, pieces out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from phloem.shared.errors import PhloemError
from phloem.shared.protocol.session import PeerRef
from phloem.shared.protocol.transfer import (
    Admitted,
    Cancel,
    Credit,
    Piece,
    PieceDigest,
    Ready,
    TransferMessage,
)
from phloem.shared.transfer.channel import Channel, not_open
from phloem.shared.transfer.errors import protocol_violation
from phloem.shared.transfer.events import (
    AdmittedReceived,
    CancelReceived,
    ReadyReceived,
    SlotAvailable,
    TransferEvent,
)
from phloem.shared.transfer.frames import FrameSocket
from phloem.shared.transfer.mailbox import Mailbox
from phloem.shared.transfer.pending import Moved, Pending
from phloem.shared.transfer.planes import DataPlane, PlaneSpec
from phloem.shared.transfer.staging import SendRing, StagingSlot
from phloem.shared.transfer.stats import PeerMeter

_NEXT_PIECE_S = 0.000_3  # within which a piece is posted that was announced with others


@dataclass(frozen=True, slots=True)
class _Sending:
    gathered: Moved
    pending: Pending
    slot: StagingSlot
    num_bytes: int
    posted_at: float


class PrefillChannel(Channel):
    side = "prefill"

    def __init__(
        self,
        peer: PeerRef,
        name: str,
        plane_spec: PlaneSpec,
        frames: FrameSocket,
        deliver: Callable[[TransferEvent], None],
        meter: PeerMeter,
        *,
        slots: list[StagingSlot],
        credits: int,
    ) -> None:
        super().__init__(peer, name, plane_spec, frames, deliver, meter)
        self._ring = SendRing(slots, credits)
        self._sendings: Mailbox[_Sending] = Mailbox(len(slots))
        self._announced: deque[Piece] = deque()  # and not posted yet
        self._posted: deque[_Sending] = deque()  # and not given to the completing thread yet

    def acquire(self) -> StagingSlot | None:
        if not self.is_open:
            raise not_open(self.peer)
        return self._ring.acquire()

    def give_back(self, slot: StagingSlot) -> None:
        """A slot of an older channel is left alone."""
        if slot.channel_name == self.name:
            self._tell_if(self._ring.give_back(slot))

    def announce(self, pieces: Sequence[Piece], slots: Sequence[StagingSlot]) -> None:
        """Sends their headers, in one go: decode posts its receives while they are gathered. Each is sent
        next, in its slot, in their order.

        Raises `channel_lost`, also when a slot is of an older channel, which was lost while the slots were
        acquired: those of this one are given back.
        """
        if any(slot.channel_name != self.name for slot in slots):
            for slot in slots:
                self.give_back(slot)
            raise not_open(self.peer)
        self._announced.extend(pieces)
        self._ring.announcing(len(pieces))
        self.send(*pieces)

    def send_piece(self, piece: Piece, slot: StagingSlot, gathered: Moved) -> None:
        """Posts the bytes, to leave when the device has gathered them; sends the header, if it was not
        announced. Raises `channel_lost`, also when the slot is of an older channel."""
        plane = self._plane
        if slot.channel_name != self.name or plane is None:
            raise not_open(self.peer)
        assert 0 < piece.num_bytes <= slot.tensor.numel(), "the piece doesn't fit into the slot"
        if not self._announced:
            self.announce([piece], [slot])
        announced = self._announced.popleft()
        assert announced == piece, "what was announced is sent next"
        self._ring.sending(slot)
        try:
            pending = plane.post_send(slot.tensor, gathered, piece.num_bytes)
        except PhloemError as error:
            self.fail(error)
            raise not_open(self.peer) from error
        self._posted.append(_Sending(gathered, pending, slot, piece.num_bytes, time.monotonic()))
        # Only when all is posted that was announced: the completing thread would take the interpreter.
        while self._posted and not self._announced:
            self._sendings.put(self._posted.popleft())

    @property
    def is_idle(self) -> bool:
        """Also: the peer's engine has taken every piece."""
        return super().is_idle and (self._failed.is_set() or self._ring.is_idle)

    def _on_message(self, message: TransferMessage, plane: DataPlane) -> None:
        match message:
            case Ready():
                if message.num_held_pages < 0:
                    raise protocol_violation(f"{message.num_held_pages} held pages")
                self._emit(ReadyReceived(self.peer, message))
            case Admitted():
                self._emit(AdmittedReceived(self.peer, message, time.monotonic()))
            case Credit():
                self._tell_if(self._ring.credit(message.num_slots))
            case Cancel():
                self._emit(CancelReceived(self.peer, self.side, message))
            case _:
                raise protocol_violation(f"decode sent {type(message).__name__}")

    def _on_silence(self) -> None:
        pass

    def _on_end_of_stream(self, error: PhloemError) -> None:
        self.fail(error)

    def _complete(self) -> None:
        leaving: deque[tuple[_Sending, float]] = deque()  # and since when
        while True:
            self._tell_digests(leaving)
            sending, began_at = leaving.popleft()
            sending.pending.wait(self._deadline_from(sending.posted_at))
            self._meter.sent(sending.num_bytes, began_at, time.monotonic())
            self._tell_if(self._ring.sent(sending.slot))

    def _tell_digests(self, leaving: deque[tuple[_Sending, float]]) -> None:
        """Of all that was posted by now, or is announced; there is something then. They must not wait for
        the bytes of the piece before. Those that the device has by now go at once."""
        digests: list[PieceDigest] = []
        sending = self._sendings.get(0.0 if leaving else None)
        while sending is not None:
            began_at = sending.posted_at
            if not sending.gathered.done():
                self._send_all(digests)
                sending.gathered.wait(self._deadline_from(began_at))
                began_at = time.monotonic()  # until then the link was not what it waited for
            digests.append(PieceDigest(sending.gathered.digest()))
            leaving.append((sending, began_at))
            sending = self._sendings.get(0.0)
            if sending is None:
                self._send_all(digests)
                sending = self._sendings.get(_NEXT_PIECE_S) if self._announced else None

    def _send_all(self, digests: list[PieceDigest]) -> None:
        if digests:
            self.send(*digests)
            digests.clear()

    def _close_completions(self) -> None:
        self._sendings.close()

    def _tell_if(self, relieved: bool) -> None:
        if relieved:
            self._emit(SlotAvailable(self.peer))
