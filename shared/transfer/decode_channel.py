"""The decode side of a channel: pieces in, credits out.

Where a device can wait for the bytes of a piece, the engine is told of it when its header comes, and queues
what scatters it behind them: the device goes on by itself, and this thread only looks whether the peer keeps
its deadlines. Elsewhere the engine is told when bytes and digest are there.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, cast

import msgspec

from phloem.shared.errors import ErrorInfo, PhloemError
from phloem.shared.protocol.session import PeerRef
from phloem.shared.protocol.transfer import Cancel, Credit, Last, Piece, PieceDigest, TransferMessage
from phloem.shared.transfer.channel import Channel
from phloem.shared.transfer.device_event import USUAL_WAIT_S
from phloem.shared.transfer.errors import protocol_violation, transfer_timeout
from phloem.shared.transfer.events import CancelReceived, LastReceived, PieceReceived, TransferEvent
from phloem.shared.transfer.frames import FrameSocket
from phloem.shared.transfer.mailbox import Mailbox
from phloem.shared.transfer.pending import Incoming, Moved, Pending, SentDigest
from phloem.shared.transfer.planes import DataPlane, PlaneSpec
from phloem.shared.transfer.staging import ReceiveRing, StagingSlot
from phloem.shared.transfer.stats import PeerMeter

_MAX_ARRIVALS = 256  # messages and pieces that wait for bytes before them; CUDA queues a thousand launches
_LAST_BYTES_S = 1.0  # that posted receives get once the peer has left
_WATCH_S = 0.000_5  # between two looks at bytes that the engine waits for as well
_ONE_CREDIT = Credit(1)


@dataclass(frozen=True, slots=True)
class _Receiving:
    piece: PieceReceived
    sent_digest: SentDigest
    pending: Pending
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
        self._posted: deque[_Receiving] = deque()  # and not given to the completing thread yet
        self._unheard: deque[PieceReceived] = deque()  # that the engine is to be told of
        self._untold: deque[SentDigest] = deque()  # of the pieces whose digests have not come

    def release(self, piece: PieceReceived, after: Moved | None) -> None:
        """The slot may be filled again behind `after`; one of an older channel is left alone, and so is one
        of a lost channel. Its bytes may still be on their way: the next ones come behind them."""
        if piece.slot.channel_name != self.name:
            return
        self._ring.release(piece.slot, after)
        with contextlib.suppress(PhloemError):  # lost: its event comes
            self.send(_ONE_CREDIT)

    @property
    def _runs_ahead(self) -> bool:
        return self._plane is not None and self._plane.runs_ahead

    def _on_message(self, message: TransferMessage, plane: DataPlane) -> None:
        match message:
            case Piece():
                check_header(message, self._staging_bytes)
                self._expect(message, plane)
            case PieceDigest():
                if not self._untold:
                    raise protocol_violation("a digest came without its piece")
                self._untold.popleft().tell(message.digest)
            case Last():
                if message.num_pieces < 0:
                    raise protocol_violation(f"{message.num_pieces} pieces")
                self._pass_on(message)
            case Cancel():
                self._pass_on(message)
            case _:
                raise protocol_violation(f"prefill sent {type(message).__name__}")

    def _pass_on(self, message: Last | Cancel) -> None:
        """Behind the pieces that the engine was or will be told of."""
        if self._runs_ahead:
            self._tell_of_pieces()
            self._tell(message)
        else:
            self._on_silence()
            self._arrivals.put(message, self._timeout_s)

    def _tell(self, message: Last | Cancel) -> None:
        if isinstance(message, Last):
            self._emit(LastReceived(self.peer, message))
        else:
            self._emit(CancelReceived(self.peer, self.side, message))

    def _expect(self, header: Piece, plane: DataPlane) -> None:
        """Posts the receive of a piece; tells the engine, if its device can wait for it."""
        slot, after = self._ring.take()
        posted_at = time.monotonic()
        pending = plane.post_receive(slot.tensor, header.num_bytes, after)
        data, sent_digest = slot.tensor[: header.num_bytes], SentDigest()
        self._untold.append(sent_digest)
        if self._runs_ahead:
            incoming = cast(Incoming, pending)
            piece = PieceReceived(self.peer, header, data, slot, incoming, sent_digest)
            self._unheard.append(piece)
        else:
            piece = PieceReceived(self.peer, header, data, slot)
        self._posted.append(_Receiving(piece, sent_digest, pending, posted_at))

    def _tell_of_pieces(self) -> None:
        """When no other frame is there: the engine's thread would keep the interpreter from the receives of
        pieces that were announced together, to scatter bytes that have not come."""
        while self._unheard:
            self._emit(self._unheard.popleft())

    def _on_silence(self) -> None:
        """Only now does the completing thread wake up: it would take the interpreter from the engine's."""
        self._tell_of_pieces()
        while self._posted:
            self._arrivals.put(self._posted.popleft(), self._timeout_s)

    def _on_end_of_stream(self, error: PhloemError) -> None:
        # What came before the end is good: a peer that drains hands its last request over and leaves. Its
        # bytes are on their way, or the peer is dead and NCCL would wait for them until the deadline.
        self._on_silence()
        self._arrivals.put(error.info, self._timeout_s)
        if not self._failed.wait(_LAST_BYTES_S):
            self.fail(error)

    def _complete(self) -> None:
        while True:
            arrival = self._arrivals.get()
            match arrival:
                case _Receiving():
                    self._receive(arrival)
                case Last() | Cancel():
                    self._tell(arrival)
                case ErrorInfo():
                    raise PhloemError.from_info(arrival)
                case None:
                    raise AssertionError("get without a timeout gives an item")

    def _receive(self, arrival: _Receiving) -> None:
        if self._runs_ahead:
            _watch(arrival.pending, min(USUAL_WAIT_S, self._deadline_from(arrival.posted_at)))
        arrival.pending.wait(self._deadline_from(arrival.posted_at))
        self._meter.received(arrival.piece.header.num_bytes, arrival.posted_at, time.monotonic())
        digest = arrival.sent_digest.wait(max(0.0, self._deadline_from(arrival.posted_at)))
        if digest is None:
            raise transfer_timeout("a piece came, but not its digest")
        if arrival.piece.incoming is None:
            header = msgspec.structs.replace(arrival.piece.header, digest=digest)
            self._emit(PieceReceived(self.peer, header, arrival.piece.data, arrival.piece.slot))

    def _close_completions(self) -> None:
        self._arrivals.close()


def _watch(pending: Pending, timeout_s: float) -> None:
    """Until it is done, or the time is over. The engine looks by itself, and often; this looks so seldom that
    it is not in the way."""
    deadline = time.monotonic() + timeout_s
    while not pending.done() and time.monotonic() < deadline:
        time.sleep(_WATCH_S)


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
