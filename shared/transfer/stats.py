"""What has moved between this endpoint and one peer."""

from __future__ import annotations

import threading

import msgspec

from phloem.shared.errors import ErrorInfo


class PeerStats(msgspec.Struct, frozen=True):
    """Cumulative over the peer's channels. Seconds count the time in which at least one piece was under way,
    so that bytes / seconds is the bandwidth."""

    bytes_sent: int = 0
    pieces_sent: int = 0
    send_s: float = 0.0
    bytes_received: int = 0
    pieces_received: int = 0
    receive_s: float = 0.0
    channels_opened: int = 0


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
        with self._lock:
            self._stats = msgspec.structs.replace(
                self._stats,
                bytes_sent=self._stats.bytes_sent + num_bytes,
                pieces_sent=self._stats.pieces_sent + 1,
                send_s=self._stats.send_s + self._sending.add(posted_at, done_at),
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
