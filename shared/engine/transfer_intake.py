"""What the KV transfer tells the engine: each event to the side of the hand-over that it concerns."""

from __future__ import annotations

import logging

from phloem.shared.engine.handover_receive import HandoverReceiver
from phloem.shared.engine.handover_send import HandoverSender
from phloem.shared.engine.request_ends import RequestEnds
from phloem.shared.errors import ErrorInfo
from phloem.shared.protocol.session import PeerRef
from phloem.shared.transfer.events import (
    AdmittedReceived,
    CancelReceived,
    ChannelLost,
    ChannelOpened,
    LastReceived,
    PieceReceived,
    ReadyReceived,
    SlotAvailable,
    TransferEvent,
)

log = logging.getLogger(__name__)


class TransferIntake:
    """Called from the engine's thread only."""

    def __init__(self, sender: HandoverSender, receiver: HandoverReceiver, ends: RequestEnds) -> None:
        self._sender = sender
        self._receiver = receiver
        self._ends = ends

    def take(self, event: TransferEvent) -> None:
        match event:
            case ChannelOpened(peer, side):
                self._opened(peer, side)
            case ChannelLost(peer, side, error):
                self._lost(peer, side, error)
            case ReadyReceived(peer, message):
                self._sender.on_ready(peer, message)
            case SlotAvailable():
                self._sender.on_slot()
            case PieceReceived():
                self._ends.handovers([self._receiver.on_piece(event)])
            case LastReceived(peer, last):
                self._ends.handovers([self._receiver.on_last(peer, last)])
            case AdmittedReceived(_, admitted, at_s):
                self._sender.on_admitted((admitted.request_id, admitted.attempt), at_s)
            case CancelReceived(peer, side, cancel):
                if side == "decode":
                    self._ends.handovers([self._receiver.on_cancel(peer, cancel)])
                else:
                    ended = self._sender.on_cancel(peer, (cancel.request_id, cancel.attempt))
                    self._ends.handovers([ended])

    def _opened(self, peer: PeerRef, side: str) -> None:
        log.info("KV channel with %s (as %s) is open", peer.worker_id, side)
        if side == "decode":
            self._receiver.on_opened(peer)

    def _lost(self, peer: PeerRef, side: str, error: ErrorInfo) -> None:
        log.warning("KV channel with %s (as %s) is lost: %s", peer.worker_id, side, error.message)
        end = self._receiver if side == "decode" else self._sender
        self._ends.handovers(end.on_lost(peer, error))
