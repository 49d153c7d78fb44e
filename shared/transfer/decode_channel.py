"""The decode side of a channel: pieces in, credits out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import msgspec
import torch

from phloem.shared.errors import ErrorInfo, PhloemError
from phloem.shared.protocol.session import PeerRef
from phloem.shared.protocol.transfer import Cancel, Credit, Last, Piece, PieceDigest, TransferMessage
from phloem.shared.transfer.channel import Channel, Outgoing
from phloem.shared.transfer.errors import protocol_violation, transfer_timeout
from phloem.shared.transfer.events import CancelReceived, LastReceived, PieceReceived, TransferEvent
from phloem.shared.transfer.frames import FrameSocket
from phloem.shared.transfer.mailbox import Mailbox
from phloem.shared.transfer.pending import Pending
from phloem.shared.transfer.planes import DataPlane, PlaneSpec
from phloem.shared.transfer.staging import ReceiveRing, StagingSlot
from phloem.shared.transfer.stats import PeerMeter

_MAX_ARRIVALS = 4096  # messages and pieces that wait for bytes before them
_LAST_BYTES_S = 1.0  # that posted receives get once the peer has left
_ONE_CREDIT = Credit(1)


@dataclass(frozen=True, slots=True)
class _Receiving:
    pending: Pending
    header: Piece
    slot: StagingSlot
    posted_at: float


_Arrival: TypeAlias = _Receiving | Last | Cancel | ErrorInfo  # ErrorInfo: the stream has ended


class DecodeChannel(Channel):
    side = "decode"

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
    ) -> None:
        super().__init__(peer, name, plane_spec, frames, deliver, meter)
        self._staging_bytes = slots[0].tensor.numel()
        self._ring = ReceiveRing(slots)
        self._arrivals: Mailbox[_Arrival] = Mailbox(_MAX_ARRIVALS)
        self._digests: Mailbox[int] = Mailbox(len(slots))  # in the order of the pieces

    def release(self, piece: PieceReceived, after: Pending) -> None:
        """Empties the slot; one of an older channel is left alone, and so is one of a lost channel."""
        if piece.slot.channel_name != self.name:
            return
        self._ring.releasing(piece.slot)
        with contextlib.suppress(PhloemError):  # lost: its event comes
            self._post(Outgoing(_ONE_CREDIT, piece.slot, emptied=after))

    def _warm_up(self, plane: DataPlane) -> None:
        byte = torch.zeros(1, dtype=torch.uint8, device=self._plane_spec.device)
        plane.post_receive(byte, 1).wait(self._timeout_s)
        if int(byte) != 1:
            raise protocol_violation("the first byte is wrong")

    def _on_message(self, message: TransferMessage, plane: DataPlane) -> None:
        match message:
            case Piece():
                check_header(message, self._staging_bytes)
                slot = self._ring.take()
                posted_at = time.monotonic()
                pending = plane.post_receive(slot.tensor, message.num_bytes)
                self._arrivals.put(_Receiving(pending, message, slot, posted_at), self._timeout_s)
            case PieceDigest():
                self._digests.put(message.digest)  # more of them than slots: the peer breaks a rule
            case Last():
                if message.num_pieces < 0:
                    raise protocol_violation(f"{message.num_pieces} pieces")
                self._arrivals.put(message, self._timeout_s)
            case Cancel():
                self._arrivals.put(message, self._timeout_s)
            case _:
                raise protocol_violation(f"prefill sent {type(message).__name__}")

    def _on_end_of_stream(self, error: PhloemError) -> None:
        # What came before the end is good: a peer that drains hands its last request over and leaves. Its
        # bytes are on their way, or the peer is dead and NCCL would wait for them until the deadline.
        self._arrivals.put(error.info, self._timeout_s)
        if not self._failed.wait(_LAST_BYTES_S):
            self.fail(error)

    def _before_sending(self, item: Outgoing) -> None:
        if item.slot is not None and item.emptied is not None:
            item.emptied.wait(self._timeout_s)
            self._ring.emptied(item.slot)

    def _after_sending(self, item: Outgoing, plane: DataPlane) -> None:
        pass

    def _complete(self) -> None:
        while True:
            arrival = self._arrivals.get()
            match arrival:
                case _Receiving():
                    self._receive(arrival)
                case Last():
                    self._emit(LastReceived(self.peer, arrival))
                case Cancel():
                    self._emit(CancelReceived(self.peer, self.side, arrival))
                case ErrorInfo():
                    raise PhloemError.from_info(arrival)
                case None:
                    raise AssertionError("get without a timeout gives an item")

    def _receive(self, arrival: _Receiving) -> None:
        arrival.pending.wait(self._deadline_from(arrival.posted_at))
        digest = self._digests.get(max(0.0, self._deadline_from(arrival.posted_at)))
        if digest is None:
            raise transfer_timeout("a piece came, but not its digest")
        header = msgspec.structs.replace(arrival.header, digest=digest)
        self._meter.received(header.num_bytes, arrival.posted_at, time.monotonic())
        data = arrival.slot.tensor[: header.num_bytes]
        self._emit(PieceReceived(self.peer, header, data, arrival.slot))

    def _close_completions(self) -> None:
        self._arrivals.close()
        self._digests.close()


def check_header(piece: Piece, staging_bytes: int) -> None:
    """Raises `transfer_protocol` for counts that no honest peer sends."""
    sane = (
        0 < piece.num_bytes <= staging_bytes
        and piece.page_start >= 0
        and piece.num_pages > 0
        and 0 <= piece.layer_start < piece.layer_end
    )
    if not sane:
        raise protocol_violation(f"a piece header makes no sense: {piece}")
