"""What has moved between this endpoint and one peer."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping

import msgspec

from phloem.shared.errors import ErrorInfo
from phloem.shared.protocol.session import PeerRef

# A long prompt of an 8B model is a dozen pieces, so that a link's rate is known anew after three of them.
_RECENT_PIECES = 32


class PeerStats(msgspec.Struct, frozen=True):
    """Cumulative over the peer's channels. Seconds count the time in which at least one piece was under way,
    so that bytes / seconds is the bandwidth. In `recent_*` a piece counts the less the more came after it:
    by 1 / e after `_RECENT_PIECES`."""

    bytes_sent: int = 0
    pieces_sent: int = 0
    send_s: float = 0.0
    recent_bytes: float = 0.0  # sent
    recent_s: float = 0.0
    bytes_received: int = 0
    pieces_received: int = 0
    receive_s: float = 0.0
    channels_opened: int = 0

    @property
    def send_bytes_per_s(self) -> float:
        """A moving average over the last pieces, by their bytes; zero: not measured yet."""
        return self.recent_bytes / self.recent_s if self.recent_s > 0 else 0.0


class SendRates(msgspec.Struct, frozen=True):
    """Moving averages of what channels send while they do, in bytes per second; zero: not measured yet."""

    overall: float = 0.0
    by_peer: dict[PeerRef, float] = {}

    def slowest(self, peers: Iterable[PeerRef]) -> float:
        """Of these peers. One that nothing was sent to yet counts as all others together."""
        return min((self.by_peer.get(peer, self.overall) for peer in peers), default=self.overall)


def send_rates(stats: Mapping[PeerRef, PeerStats]) -> SendRates:
    """Of the peers that there are."""
    by_peer = {peer: rate for peer, each in stats.items() if (rate := each.send_bytes_per_s) > 0}
    recent_s = sum(each.recent_s for each in stats.values())
    recent_bytes = sum(each.recent_bytes for each in stats.values())
    return SendRates(recent_bytes / recent_s if recent_s > 0 else 0.0, by_peer)


class TransferStatus(msgspec.Struct, frozen=True):
    """An endpoint as it is now. `num_channels` are open; `cut_off` are the workers, by id, that can't be
    handed over to for the time being, dialed in vain or refused, and why. `staging_lent_bytes` are held by
    channels, or still in use of those that have ended; `staging_quarantined_bytes` are lent to nobody any
    more, since a channel that has ended may still write to them."""

    num_channels: int = 0
    cut_off: dict[str, ErrorInfo] = {}
    staging_lent_bytes: int = 0
    staging_quarantined_bytes: int = 0


class PeerMeter:
    """Counts for one peer. Thread-safe."""

    def __init__(self) -> None:
        self._stats = PeerStats()
        self._sending = _BusyTime()
        self._receiving = _BusyTime()
        self._lock = threading.Lock()

    def opened(self) -> None:
        with self._lock:
            self._stats = msgspec.structs.replace(
                self._stats, channels_opened=self._stats.channels_opened + 1
            )

    def sent(self, num_bytes: int, posted_at: float, done_at: float) -> None:
        keep = 1 - 1 / _RECENT_PIECES
        with self._lock:
            stats, busy_s = self._stats, self._sending.add(posted_at, done_at)
            self._stats = msgspec.structs.replace(
                stats,
                bytes_sent=stats.bytes_sent + num_bytes,
                pieces_sent=stats.pieces_sent + 1,
                send_s=stats.send_s + busy_s,
                recent_bytes=keep * stats.recent_bytes + num_bytes,
                recent_s=keep * stats.recent_s + busy_s,
            )

    def received(self, num_bytes: int, posted_at: float, done_at: float) -> None:
        with self._lock:
            self._stats = msgspec.structs.replace(
                self._stats,
                bytes_received=self._stats.bytes_received + num_bytes,
                pieces_received=self._stats.pieces_received + 1,
                receive_s=self._stats.receive_s + self._receiving.add(posted_at, done_at),
            )

    def read(self) -> PeerStats:
        with self._lock:
            return self._stats


class _BusyTime:
    """Adds up intervals that may overlap, given in order of their ends."""

    def __init__(self) -> None:
        self._until = 0.0

    def add(self, started_at: float, ended_at: float) -> float:
        """Seconds of the interval that no earlier one covers."""
        fresh_s = max(0.0, ended_at - max(started_at, self._until))
        self._until = ended_at
        return fresh_s
