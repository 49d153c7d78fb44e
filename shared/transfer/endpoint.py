"""What an engine holds of the transfer layer.

Every method but `close` returns at once, may be called from any thread, and is answered by events through
`deliver` (see `events`). Calls that need an open channel raise `channel_lost` (retryable) when there is none;
the `ChannelLost` event of a channel that was open comes in any case.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from phloem.shared.errors import PhloemError
from phloem.shared.host_port import split_host_port
from phloem.shared.protocol.session import PeerRef
from phloem.shared.protocol.transfer import Admitted, Cancel, Last, Piece, Ready
from phloem.shared.transfer.channel import not_open
from phloem.shared.transfer.config import TransferConfig
from phloem.shared.transfer.decode_channel import DecodeChannel
from phloem.shared.transfer.dialer import Dialer
from phloem.shared.transfer.errors import channel_lost
from phloem.shared.transfer.events import ChannelLost, PieceReceived, Side, TransferEvent
from phloem.shared.transfer.listener import Listener
from phloem.shared.transfer.pending import Moved
from phloem.shared.transfer.prefill_channel import PrefillChannel
from phloem.shared.transfer.resources import Resources
from phloem.shared.transfer.staging import StagingSlot
from phloem.shared.transfer.stats import PeerMeter, PeerStats, TransferStatus

log = logging.getLogger(__name__)

CLOSE_WAIT_S = 5.0  # a worker that takes 10 s to stop is killed


class TransferEndpoint:
    """`address` is "host:port" of the control listener, "" when the endpoint does not accept.

    `deliver` is called from the endpoint's threads, and from `peer_down`; it must not block nor call back.
    """

    def __init__(self, config: TransferConfig, deliver: Callable[[TransferEvent], None]) -> None:
        """Allocates the memory of all channels.

        Raises `address_unavailable`, and what torch raises when the device has no room.
        """
        self._config = config
        self._deliver_to_engine = deliver
        self._lock = threading.Lock()  # guards all below
        self._closing = threading.Event()
        self._dialers: dict[str, Dialer] = {}  # by the decode worker's id: one epoch at a time
        self._retired: list[Dialer] = []  # stopped, their threads may still be ending
        self._meters: dict[PeerRef, PeerMeter] = {}
        self._resources = resources = Resources(config)
        self._listener = Listener(config, resources, self._deliver, self._meter) if config.accepts else None
        self.address = self._listener.address if self._listener is not None else ""

    # --- peers ---

    def peer_up(self, peer: PeerRef, address: str) -> None:
        """Prefill side: dials "host:port" in the background until a channel opens, and again when it is lost,
        until `peer_down` or another epoch of the worker comes up. An address that is none is answered by
        `ChannelLost` (`bad_address`)."""
        try:
            split_host_port(address)
        except PhloemError as error:
            self._deliver(ChannelLost(peer, "prefill", error.info))
            return
        with self._lock:
            if self._closing.is_set():
                return
            older = self._dialers.get(peer.worker_id)
            if older is not None and (older.peer, older.address) == (peer, address):
                return
        meter = self._meter(peer)
        if older is not None:
            self._retire(older, f"{older.peer} is superseded by {peer}")
        with self._lock:
            if self._closing.is_set():
                return
            self._dialers[peer.worker_id] = Dialer(
                peer, address, self._config, self._resources, self._deliver, meter
            )

    def peer_down(self, peer: PeerRef) -> None:
        """Ends the peer's channels now: their `ChannelLost` is delivered before this returns."""
        reason = f"{peer} is down"
        with self._lock:
            dialer = self._dialers.get(peer.worker_id)
            self._meters.pop(peer, None)
        if dialer is not None and dialer.peer == peer:
            self._retire(dialer, reason)
        if self._listener is not None:
            self._listener.drop(peer, channel_lost(reason))
        with self._lock:
            waiting = [other for other in self._dialers.values() if other.cut_off is not None]
        for other in waiting:  # there may be memory for them now
            other.retry_soon()

    def is_open(self, peer: PeerRef, side: Side) -> bool:
        """Whether a channel is open in which this process plays `side`."""
        channel = self._find(peer, side)
        return channel is not None and channel.is_open

    # --- decode side ---

    def send_ready(self, peer: PeerRef, message: Ready) -> None:
        self._channel(peer, "decode").send(message)

    def release(self, piece: PieceReceived, after: Moved | None = None) -> None:
        """The slot may be filled again once `after` is done, for which the device waits. Exactly once per
        piece; raises nothing when the channel is lost by now."""
        channel = self._decode_channel(piece.peer)
        if channel is not None:
            channel.release(piece, after)

    def send_admitted(self, peer: PeerRef, message: Admitted) -> None:
        self._channel(peer, "decode").send(message)

    # --- prefill side ---

    def acquire_slot(self, peer: PeerRef) -> StagingSlot | None:
        """A slot to gather into, for exactly one `send_piece` or `give_back`; None when no slot is free or
        the peer gave no credit: one `SlotAvailable` follows when that has changed."""
        return self._open_prefill_channel(peer).acquire()

    def give_back(self, peer: PeerRef, slot: StagingSlot) -> None:
        """Returns a slot unsent; nothing happens when its channel is lost."""
        channel = self._prefill_channel(peer)
        if channel is not None:
            channel.give_back(slot)

    def announce(self, peer: PeerRef, pieces: Sequence[Piece], slots: Sequence[StagingSlot]) -> None:
        """Tells decode at once of pieces that are sent next, in this order and these slots, so that it posts
        their receives. Not long before: a receive that waits for bytes takes a part of decode's device."""
        self._open_prefill_channel(peer).announce(pieces, slots)

    def send_piece(self, peer: PeerRef, piece: Piece, slot: StagingSlot, gathered: Moved) -> None:
        """Sends `slot.tensor[:piece.num_bytes]` once `gathered` is done, its digest, and its header if that
        was not announced. The slot is the endpoint's again."""
        self._open_prefill_channel(peer).send_piece(piece, slot, gathered)

    def send_last(self, peer: PeerRef, message: Last) -> None:
        """Arrives after all pieces sent before."""
        self._channel(peer, "prefill").send(message)

    # --- both ---

    def send_cancel(self, peer: PeerRef, message: Cancel, side: Side) -> None:
        """`side` is the part that this process plays. Arrives after what was sent before."""
        self._channel(peer, side).send(message)

    @property
    def num_channels(self) -> int:
        """That are open now."""
        with self._lock:
            dialers = list(self._dialers.values())
        channels = [channel for dialer in dialers if (channel := dialer.channel) is not None]
        accepted = self._listener.num_open if self._listener is not None else 0
        return sum(channel.is_open for channel in channels) + accepted

    @property
    def may_use_device(self) -> bool:
        """Whether NCCL may have a kernel there, which waits for a peer: from before a channel opens until
        what is left of it is gone."""
        return self._resources.pool.is_lent or self._resources.stuck.are_there

    def status(self) -> TransferStatus:
        """Of now."""
        with self._lock:
            dialers = list(self._dialers.values())
        return TransferStatus(
            self.num_channels,
            {d.peer.worker_id: error for d in dialers if (error := d.cut_off) is not None},
            self._resources.pool.lent_bytes,
            self._resources.pool.quarantined_bytes,
        )

    def stats(self) -> dict[PeerRef, PeerStats]:
        """By peer, of the peers that were not reported down."""
        with self._lock:
            return {peer: meter.read() for peer, meter in self._meters.items()}

    def close(self, grace_s: float = 1.0) -> None:
        """Lets what was sent arrive, for at most `grace_s`; then ends everything, without events, and waits
        for all threads: moments as a rule, `CLOSE_WAIT_S` at most. What NCCL has not let go of by then is
        left to the end of the process."""
        with self._lock:
            self._closing.set()
            dialers = list(self._dialers.values())
        self._let_leave([dialer.channel for dialer in dialers], time.monotonic() + grace_s)
        error = channel_lost("shutting down")
        for dialer in dialers:
            dialer.stop(error)
        threads = [dialer.thread for dialer in (*dialers, *self._retired)]
        if self._listener is not None:
            threads += self._listener.close(error)
        deadline = time.monotonic() + CLOSE_WAIT_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if left := [thread.name for thread in threads if thread.is_alive()]:
            log.warning("left to the end of the process after %g s: %s", CLOSE_WAIT_S, ", ".join(left))

    def _deliver(self, event: TransferEvent) -> None:
        if not self._closing.is_set():
            self._deliver_to_engine(event)

    @staticmethod
    def _let_leave(channels: list[PrefillChannel | None], deadline: float) -> None:
        """Polls: this is the way out, and short."""
        for channel in channels:
            while channel is not None and not channel.is_idle and time.monotonic() < deadline:
                time.sleep(0.002)

    def _meter(self, peer: PeerRef) -> PeerMeter:
        """The peer's meter; those of the worker's other epochs are dropped."""
        with self._lock:
            for other in [p for p in self._meters if p.worker_id == peer.worker_id and p != peer]:
                del self._meters[other]
            return self._meters.setdefault(peer, PeerMeter())

    def _retire(self, dialer: Dialer, reason: str) -> None:
        with self._lock:
            if self._dialers.get(dialer.peer.worker_id) is dialer:
                del self._dialers[dialer.peer.worker_id]
            self._retired = [old for old in self._retired if old.thread.is_alive()]
            self._retired.append(dialer)
        dialer.stop(channel_lost(reason))

    def _find(self, peer: PeerRef, side: Side) -> PrefillChannel | DecodeChannel | None:
        return self._prefill_channel(peer) if side == "prefill" else self._decode_channel(peer)

    def _channel(self, peer: PeerRef, side: Side) -> PrefillChannel | DecodeChannel:
        channel = self._find(peer, side)
        if channel is None:
            raise not_open(peer)
        return channel

    def _open_prefill_channel(self, peer: PeerRef) -> PrefillChannel:
        channel = self._prefill_channel(peer)
        if channel is None:
            raise not_open(peer)
        return channel

    def _prefill_channel(self, peer: PeerRef) -> PrefillChannel | None:
        dialer = self._dialers.get(peer.worker_id)
        return dialer.channel if dialer is not None and dialer.peer == peer else None

    def _decode_channel(self, peer: PeerRef) -> DecodeChannel | None:
        return self._listener.channel(peer) if self._listener is not None else None
